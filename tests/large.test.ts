// Trees so large that a walk over there takes long: edict then goes by what stat says of the paths that it knows.
// Nothing that anybody changes may be missed for that.
import { afterAll, beforeAll, describe, expect, test } from "bun:test"
import { readFileSync, writeFileSync } from "node:fs"
import { startLab, type Lab } from "./sync-lab"

const DIRECTORY = "/root/large"

/** Every path but those of .git, with type, mode and content. */
const STATE = `find . -path ./.git -prune -o \\( -type d -printf '%P/\\n' -o -printf '%P %y %m %l\\n' \\) | sort
find . -path ./.git -prune -o -type f -print0 | sort -z | xargs -0 sha256sum`

let lab: Lab

beforeAll(async () => {
  // With a program hidden, /usr/bin is a directory of the machine's own.
  lab = await startLab([{ hide: ["fish"] }])
  const find = lab.host.outside("/usr/local/bin/find")
  writeFileSync(find, `#!/bin/sh\necho "$*" >>/tmp/walks\nexec /usr/bin/find "$@"\n`, { mode: 0o755 })
  const { code, stderr } = await lab.client.sh(`mkdir -p ${DIRECTORY} && cd ${DIRECTORY} &&
    for d in $(seq 30); do mkdir -p src/d$d; for f in $(seq 72); do echo $f >src/d$d/f$f; done; done
    ln -s f1 src/d1/link; printf 'odd' >"src/d1/a name
of two lines"; printf '/ignored/\\n*.log\\n' >.gitignore; git init -q && git add . && git commit -qm first; sleep 3`)
  if (code !== 0) throw new Error(stderr)
})

afterAll(() => lab[Symbol.asyncDispose]())

const walks = async (): Promise<number> => {
  const { stdout } = await lab.host.sh("grep -c printf /tmp/walks; : >/tmp/walks")
  return Number(stdout)
}

async function run(script: string, code = 0): Promise<void> {
  const ran = await lab.edict(DIRECTORY, script)
  expect({ code: ran.code, stderr: ran.code === code ? "" : ran.stderr }).toEqual({ code, stderr: "" })
}

/** Runs until a run walks no more; at most a few. */
async function settle(): Promise<void> {
  for (let runs = 0; runs < 6; runs++) {
    await walks()
    await run("true")
    await Bun.sleep(400) // what is remembered is remembered after the answer
    if ((await walks()) === 0) return
  }
  throw new Error("every run walks")
}

const state = async (): Promise<string> => hashed((await lab.client.sh(STATE, { cwd: DIRECTORY })).stdout)

const hashed = (text: string): string => new Bun.CryptoHasher("sha256").update(text).digest("hex")

async function expectSame(): Promise<void> {
  const there = await lab.host.sh(STATE, { cwd: remote() })
  expect(hashed(there.stdout)).toBe(await state())
}

const remote = (): string => lab.remote(DIRECTORY).replace(lab.host.outside("/root"), "/root")

const CHANGES: Record<string, string> = {
  "an edit": "echo more >>src/d3/f3",
  "an edit of the same size and date":
    "touch -r src/d4/f4 /tmp/date; printf 'X\\n' >src/d4/f4; touch -r /tmp/date src/d4/f4",
  "a new file": "echo new >src/d5/new",
  "a new file in a directory whose date is put back":
    "touch -r src/d6 /tmp/date; echo new >src/d6/new2; touch -r /tmp/date src/d6",
  "a deletion": "rm src/d7/f7",
  "another mode": "chmod 755 src/d8/f8",
  "a link that leads elsewhere": "ln -sfn f2 src/d1/link",
  "two files that change places": "mv src/d9/f1 src/d9/x; mv src/d9/f2 src/d9/f1; mv src/d9/x src/d9/f2",
  "a directory that moves": "mv src/d10 src/moved",
  "an odd name": "printf 'even' >\"src/d1/a name\nof two lines\"",
}

describe("a tree of 2,000 files", () => {
  test("that nobody changed is not walked", async () => {
    await settle()
    await run("true")
    expect(await walks()).toBe(0)
    await expectSame()
  })

  for (const [what, change] of Object.entries(CHANGES))
    test(`${what} by the command comes home`, async () => {
      await settle()
      const before = await state()
      await run(change)
      expect(await state()).not.toBe(before)
      await expectSame()
    })

  for (const [what, change] of Object.entries(CHANGES))
    test(`${what} by somebody over there between two runs is seen`, async () => {
      await run(`git -C . checkout -q -- . ; git clean -qfd`)
      await settle()
      const { code, stderr } = await lab.host.sh(change, { cwd: remote() })
      expect({ code, stderr }).toEqual({ code: 0, stderr: "" })
      await run("true")
      expect(await walks()).toBeGreaterThan(0)
      await expectSame()
    })

  test("an edit here goes over", async () => {
    await settle()
    await lab.client.sh("echo here >>src/d11/f11; rm src/d12/f12; echo new >src/d13/new", { cwd: DIRECTORY })
    await run("grep -q here src/d11/f11 && ! [ -e src/d12/f12 ] && cat src/d13/new")
    await expectSame()
  })

  test("an ignored file changes nothing, and its directory is walked again", async () => {
    await settle()
    await run("mkdir -p ignored && echo 1 >ignored/x; echo 2 >src/d14/y.log")
    const { stdout } = await lab.client.sh(
      "ls -d ignored src/d14/y.log 2>&1 | wc -l; git status --porcelain --ignored | grep -c '!!'",
      {
        cwd: DIRECTORY,
      },
    )
    expect(stdout).toBe("2\n0\n")
  })
})

test("what is remembered holds for one base only", async () => {
  await settle()
  const { stdout } = await lab.host.sh("ls -d /root/.cache/edict/*/meta/*/stats")
  const file = stdout.trim().split("\n")[0]!
  const [basis] = readFileSync(lab.host.outside(file), "utf8").split("\n")
  const { stdout: base } = await lab.host.sh(`stat -c '%f/%i/%s/%.9Y/%.9Z' ${file.replace(/stats$/, "base")}`)
  expect(basis).toBe(base.trim())
})
