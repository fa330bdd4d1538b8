/** The command over there: its words, streams, exit code, terminal and signals, as if it ran here. */

import { afterAll, beforeAll, describe, expect, setDefaultTimeout, test } from "bun:test"
import { existsSync, readFileSync, statSync, writeFileSync } from "node:fs"
import { shellWords, type Result, type Running } from "./lab/lab"
import { readArgs } from "./lab/flake"
import { EDICT, project, SCRIPT, type Project, type ProjectOptions } from "./support"

setDefaultTimeout(120_000)

/** A command that runs a script of sh over there, as `nix shell` runs it. */
const script = (text: string, ...words: string[]): string[] =>
  ["nix", "shell", ".#hello", "-c", "sh", "-c", text, "sh"].concat(words)

/** What edict itself says, without its name. */
const said = (result: Result): string[] => result.stderr.match(/(?<=^edict: ).*$/gm) ?? []

/** Lines on stderr that neither edict nor Nix's progress wrote. */
const foreign = (result: Result): string[] =>
  result.stderr
    .split("\n")
    .filter((line) => line !== "" && !/^(edict: |building '|warning: Git tree|error \(ignored\):)/.test(line))

const accepted = (p: Project): number => p.host.log().match(/^Accepted /gm)?.length ?? 0

/** Asks again and again until the answer is as wanted; answers the last one. */
async function eventually<T>(
  ask: () => Promise<T>,
  wanted: (answer: T) => boolean,
  limit: number,
): Promise<T> {
  const end = performance.now() + limit
  for (;;) {
    const answer = await ask()
    if (wanted(answer) || performance.now() > end) return answer
    await Bun.sleep(100)
  }
}

/** The project of a block of tests, started before the first and stopped after the last. */
function shared(options?: ProjectOptions): () => Project {
  let started: Project | undefined
  beforeAll(async () => {
    started = await project(options)
  })
  afterAll(async () => {
    await started?.[Symbol.asyncDispose]()
  })
  return () => started!
}

// prettier-ignore
const HOSTILE = [
  "plain", "", " ", "  two  blanks  ", "\t", "a\tb", "\n", "\n\n", "line\nline", "trailing\n", "\nleading", "\r", "a\r\n",
  "'", "''", "'quoted'", `"`, `""`, `"quoted"`, `'"'"'`, `it's "both"`, "\\", "\\\\", "\\\\\\", "\\n", "\\0101", "\\'", `\\"`, "\\c", "a\\",
  "$HOME", "${HOME}", "$(id)", "$((1+1))", "`id`", "\\$HOME", "$", "$$", "$'x'", "%s", "%", "%%", "%self", "%1", "%b\\n",
  "*", "?", "[a-z]*", "**", "{a,b}", "{1..3}", "~", "~root", "~/x", "=ls", "=", "a=b", "!", "!!", "!$", "^", "^a^b",
  ";", "; id", "&", "&&", "|", "|| id", ">x", "<x", ">&2", "(", ")", "(id)", "{", "}", "[", "]", "[[", "#", "# no", "a#b", "@", ":", ",",
  "-", "--", "-n", "-e", "-c", "--help", "-x y", "--opt=a b", "+", "+x", "exit 3", "if", "end", "begin; id; end", "set -e",
  "é", "ü ß", "日本語", "🎉", "e\u0301", "\u00a0", "\u200b", "\ufeff", "\u2028", "\x01", "\x07", "\x1b[31m", "\x7f",
  "ends with blank ", "x".repeat(20_000),
]

describe.each(["bash", "zsh", "dash", "fish"] as const)("words under the login shell %s", (shell) => {
  const p = shared({ host: { shell } })

  test("arrive byte for byte", async () => {
    expect(HOSTILE.length).toBeGreaterThan(100)
    const result = await p().edict(["h", "nix", "run", ".#args", "--", ...HOSTILE])
    expect(readArgs(result.stdout)).toEqual(HOSTILE)
    expect(result).toMatchObject({ code: 0 })
    expect(foreign(result)).toEqual([])
  })

  test("arrive behind the short form, too", async () => {
    const result = await p().edict(["h", ".#args", "--", ...HOSTILE])
    expect(readArgs(result.stdout)).toEqual(HOSTILE)
    expect(result.code).toBe(0)
  })

  test("arrive one by one as the only word", async () => {
    for (const word of ["", "-", "\n"])
      expect(readArgs((await p().edict(["h", ".#args", "--", word])).stdout)).toEqual([word])
  })
})

describe("a host as Debian has it", () => {
  const p = shared()

  test("no words at all are none over there", async () => {
    expect((await p().edict(["h", ".#args"])).stdout).toBe("")
  })

  test("words behind the host belong to the command, whatever they look like", async () => {
    const words =
      "--dry-run -n --help --version --sync --no-sync -q -v --json --tty -A -p 1 -o x=y --config /no".split(
        " ",
      )
    const result = await p().edict(["h", "nix", "run", ".#args", "--", ...words])
    expect(readArgs(result.stdout)).toEqual(words)
    const version = await p().edict(["h", "nix", "--version"])
    expect(version.stdout).toMatch(/^nix \(Nix\) /)
    expect((await p().edict(["h", "nix", "run", ".#args", "--", "--", "h", "nix"])).stdout).toBe(
      "2d2d\n68\n6e6978\n",
    )
  })

  test("many words", async () => {
    const words = Array.from({ length: 500 }, (_, at) => `word ${at}`)
    expect(readArgs((await p().edict(["h", ".#args", "--", ...words])).stdout)).toEqual(words)
  })

  test("bytes that are no UTF-8 in a word", async () => {
    const { stdout, code } = await p().sh(`edict h .#args -- "$(printf 'a\\377\\200b')" x`)
    expect([stdout.split("\n")[1], code]).toEqual(["78", 0])
  })

  test.each([0, 1, 7, 42, 126, 127, 254, 255])(
    "exit code %d of the command is that of edict",
    async (code) => {
      const result = await p().edict(["h", "nix", "run", ".#status", "--", String(code)])
      expect(result).toMatchObject({ code, stdout: "" })
      expect(said(result)).toEqual([])
      expect(foreign(result)).toEqual([])
    },
  )

  test.each([
    ["KILL", 137],
    ["TERM", 143],
    ["INT", 130],
    ["HUP", 129],
    ["PIPE", 141],
  ])("a command that SIG%s ended: %d", async (signal, code) => {
    const result = await p().edict(["h", "nix", "run", ".#suicide", "--", signal])
    expect(result).toMatchObject({ code, stdout: "", held: false })
    expect(result.stderr.replace(/^building .*\n/m, "")).toBe("")
  })

  test("254 and one line for what edict itself refuses", async () => {
    const result = await p().edict(["--no-such-option", "h", "nix", "run", ".#both"])
    expect(result).toMatchObject({ code: 254, stdout: "" })
    expect(said(result)).toHaveLength(1)
    const missing = await p().edict(["h", "nix", "build", "./nowhere#x"])
    expect(missing).toMatchObject({ code: 254, stdout: "" })
    expect(said(missing)).toHaveLength(1)
    expect(missing.stderr).toContain("nowhere")
  })

  test("255 and one line for a host that cannot be reached", async () => {
    for (const host of ["ssh://root@127.0.0.1:1", "root@no.such.host.invalid", "no-such-host.invalid"]) {
      const result = await p().edict([host, "nix", "run", ".#both"])
      expect(result).toMatchObject({ code: 255, stdout: "", held: false })
      expect(result.stderr).toMatch(/^edict: cannot reach .*\n$/)
    }
  })

  test("stdin arrives whole, every byte", async () => {
    const every = Uint8Array.from({ length: 1 << 20 }, (_, at) => (at * 7 + (at >> 8)) & 255)
    expect(new Set(every).size).toBe(256)
    const result = await p().edict(["h", "nix", "run", ".#cat"], { stdin: every })
    expect(Buffer.compare(result.bytes, every)).toBe(0)
    expect(result.code).toBe(0)
  })

  test("stdin that ends at once, is closed, or is not read", async () => {
    expect(await p().edict(["h", "nix", "run", ".#cat"])).toMatchObject({ code: 0, stdout: "" })
    expect(await p().sh("edict h nix run .#cat <&-")).toMatchObject({ code: 0, stdout: "", held: false })
    expect(await p().sh("edict h nix run .#cat </dev/null")).toMatchObject({ code: 0, stdout: "" })
    expect(await p().sh("yes | edict h nix run .#exit7")).toMatchObject({ code: 7, stdout: "", held: false })
    const open = p().spawn(["h", "nix", "run", ".#exit7"], { timeout: 20_000 })
    expect(await open.result).toMatchObject({ code: 7, stdout: "", held: false })
  })

  test("a conversation: each line is answered before the next is written", async () => {
    const running = p().spawn(["h", ...script(`while read -r line; do echo "got $line"; done; echo end`)])
    for (const line of ["one", "two", "three"]) {
      running.write(`${line}\n`)
      await running.waitFor(`got ${line}\n`)
    }
    running.end()
    expect(await running.result).toMatchObject({ code: 0, stdout: "got one\ngot two\ngot three\nend\n" })
  })

  test("stdout and stderr stay apart, and edict says nothing that is not prefixed", async () => {
    await p().edict(["h", "nix", "build", "--no-link", ".#both"])
    const quiet = await p().edict(["-q", "h", "nix", "run", ".#both"])
    expect([quiet.stdout, quiet.stderr]).toEqual(["to stdout\n", "to stderr\n"])
    const loud = await p().edict(["-v", "h", "nix", "run", ".#both"])
    expect(loud.stdout).toBe("to stdout\n")
    expect(said(loud).length).toBeGreaterThan(3)
    expect(foreign(loud)).toEqual(["to stderr"])
    const built = await p().edict(["h", "nix", "build", ".#hello", ".#chain"])
    expect(built.stdout).toBe("")
    expect(said(built).length).toBeGreaterThan(0)
    expect(foreign(built)).toEqual([])
    expect((await p().edict(["h", "nix", "eval", ".#lib.answer"])).stdout).toBe("42\n")
  })

  test("stderr is binary clean as well", async () => {
    const { stderr, stdout } = await p().edict(["-q", "h", ...script(`printf 'a\\r\\001\\033[1mb' >&2`)])
    expect([stdout, stderr]).toEqual(["", "a\r\x01\x1b[1mb"])
  })

  test("much output is whole", async () => {
    const sums = await p().sh(
      `edict h ${shellWords(script("seq 1 7000000"))} | sha256sum; seq 1 7000000 | sha256sum`,
    )
    const [there, here] = sums.stdout.split("\n")
    expect(there).toBe(here!)
    expect(here).toHaveLength(67)
  })

  test("a reader that leaves early ends the command", async () => {
    const endless = `${shellWords([EDICT, "h", ...script("exec yes endless")])} | head -c 1; echo " \${PIPESTATUS[0]}"`
    const result = await p().client.run(["bash", "-c", endless], { cwd: p().dir, timeout: 20_000 })
    expect(result).toMatchObject({ stdout: "e 141\n", held: false })
    const counted = `${shellWords([EDICT, "h", "nix", "run", ".#spew", "--", "100000000"])} | head -c 1 | wc -c`
    expect(await p().sh(counted, { timeout: 20_000 })).toMatchObject({ code: 0, stdout: "1\n", held: false })
    const left = () => p().host.processes()
    expect((await eventually(left, (list) => !list.join().includes("endless"), 5000)).join()).not.toContain(
      "endless",
    )
  })

  test("the command has the directory, the environment and the umask that it would have", async () => {
    const { stdout } = await p().edict(["h", ...script("pwd; umask; env | cut -d= -f1 | sort")])
    const [directory, umask, ...names] = stdout.trimEnd().split("\n")
    expect(directory).toMatch(/^\/root\/\.cache\/edict\/client-[0-9a-f]{8}\/tree\/root\/p$/)
    expect(umask).toBe("0022")
    // prettier-ignore
    const usual = ["EDICT_RUN", "HOME", "LANG", "LOGNAME", "MAIL", "NIX_CONFIG", "OLDPWD", "PATH", "PWD", "SHELL", "SHLVL", "SSH_CLIENT", "SSH_CONNECTION", "USER", "XDG_RUNTIME_DIR", "_"]
    expect(names.filter((name) => !usual.includes(name) && !/^(LC_|XDG_)/.test(name))).toEqual([])
  })

  test("runs at the same time from one directory to one host are all right", async () => {
    await p().sh("git checkout -q . && git clean -fdq")
    const makes = (name: string) =>
      p().edict(["h", ...script(`sleep 1; echo ${name} >made-${name}; cat version.txt; exit 5`)])
    const all = await Promise.all([
      makes("a"),
      makes("b"),
      p().edict(["h", "nix", "build", ".#hello"]),
      makes("c"),
    ])
    expect(all.map(({ code, stdout }) => [code, stdout])).toEqual([
      [5, "1\n"],
      [5, "1\n"],
      [0, ""],
      [5, "1\n"],
    ])
    for (const name of ["a", "b", "c"])
      expect(readFileSync(p().file(`made-${name}`), "utf8")).toBe(`${name}\n`)
    expect((await p().sh("git status --short; cat result")).stdout).toBe(
      "?? made-a\n?? made-b\n?? made-c\n?? result\nhello\n",
    )
  })
})

describe("connections", () => {
  test("one for all stages and for the next run, kept under a short path", async () => {
    await using p = await project()
    expect(await p.edict(["h", "nix", "build", ".#chain"])).toMatchObject({ code: 0 })
    expect(await p.edict(["h", ".#bump"])).toMatchObject({ code: 0 })
    expect(readFileSync(p.file("version.txt"), "utf8")).toBe("2\n")
    expect(accepted(p)).toBe(1)
    const masters = (await p.client.processes()).filter((line) => line.includes("ControlMaster=yes"))
    expect(masters).toHaveLength(1)
    const socket = /ControlPath=(\S+)/.exec(masters[0]!)![1]!
    expect(statSync(p.client.outside(socket)).isSocket()).toBeTrue()
    expect(socket.length).toBeLessThan(87)
    expect((statSync(p.client.outside(`${socket}/..`)).mode & 0o777).toString(8)).toBe("700")
    // It goes on when that connection is gone: cleanly, or with its socket left behind.
    await p.sh(`ssh -o ControlPath=${socket} -O exit h`)
    expect(await p.edict(["h", "nix", "run", ".#exit7"])).toMatchObject({ code: 7 })
    expect(accepted(p)).toBe(2)
    await p.sh(
      `kill -9 ${(await p.client.processes()).find((line) => line.includes("ControlMaster=yes"))!.split(" ")[0]}`,
    )
    expect(existsSync(p.client.outside(socket))).toBeTrue()
    expect(await p.edict(["h", "nix", "run", ".#exit7"])).toMatchObject({ code: 7 })
    expect(accepted(p)).toBe(3)
  })

  test("two runs that open it at once leave one connection behind", async () => {
    await using p = await project()
    const both = await Promise.all([
      p.edict(["h", "nix", "run", ".#exit7"]),
      p.edict(["h", "nix", "run", ".#status", "--", "9"]),
    ])
    expect(both.map(({ code }) => code)).toEqual([7, 9])
    expect(both.map(foreign)).toEqual([[], []])
    expect(accepted(p)).toBe(1)
    expect((await p.client.processes()).filter((line) => line.includes("ControlMaster=yes"))).toHaveLength(1)
  })

  test("works where the server refuses several sessions on one connection", async () => {
    await using p = await project({ host: { sshdConfig: ["MaxSessions 1"] } })
    await worksOn(p)
    expect(accepted(p)).toBeGreaterThan(1)
  })

  test("works where no socket can be made, and puts none into somebody else's directory", async () => {
    await using p = await project()
    await p.client.sh("mkdir -m 777 /tmp/edict-0")
    await worksOn(p)
    expect((await p.client.sh("ls -A /tmp/edict-0")).stdout).toBe("")
    expect((await p.client.processes()).filter((line) => line.includes("ControlMaster=yes"))).toEqual([])
    const running = p.spawn(["h", "nix", "run", ".#wait", "--", "30"])
    await running.waitFor("waiting")
    await running.kill("SIGINT")
    expect(await running.result).toMatchObject({ code: 130, held: false })
  })

  test("a runtime directory that is too long is not used for the socket", async () => {
    await using p = await project()
    const long = `/tmp/${"long".repeat(20)}`
    await p.client.sh(`mkdir -m 700 ${long}`)
    expect(await p.edict(["h", "nix", "run", ".#exit7"], { env: { XDG_RUNTIME_DIR: long } })).toMatchObject({
      code: 7,
    })
    const master = (await p.client.processes()).find((line) => line.includes("ControlMaster=yes"))
    expect(/ControlPath=(\S+)/.exec(master!)![1]!.length).toBeLessThan(87)
  })
})

/** The usual things, on a host that makes them hard. */
async function worksOn(p: Project): Promise<void> {
  const stdin = Uint8Array.from({ length: 100_000 }, (_, at) => at & 255)
  const cat = await p.edict(["h", "nix", "run", ".#cat"], { stdin })
  expect([cat.code, cat.bytes.length]).toEqual([0, stdin.length])
  expect(Buffer.compare(cat.bytes, stdin)).toBe(0)
  expect(await p.edict(["h", "nix", "build", ".#chain"])).toMatchObject({ code: 0, stdout: "" })
  expect((await p.sh("cat result/next/next")).stdout).toBe("end\n")
  expect(await p.edict(["h", ".#bump"])).toMatchObject({ code: 0, stdout: "" })
  expect((await p.sh("git status --short")).stdout).toBe(
    " D old.txt\n M script.sh\n M version.txt\n?? new/\n?? result\n",
  )
  const result = await p.edict(["h", "nix", "run", ".#exit7"])
  expect(result).toMatchObject({ code: 7, stdout: "", held: false })
}

describe("other hosts", () => {
  test("Nix lies only in a profile", async () => {
    await using p = await project({ host: { nixOnPath: false } })
    expect((await p.client.sh("ssh h nix --version")).code).toBe(127)
    await worksOn(p)
  })

  test("no Nix at all: one line, 254", async () => {
    await using p = await project({ host: { nix: "none" } })
    const result = await p.edict(["h", "nix", "run", ".#both"])
    expect(result).toMatchObject({ code: 254, stdout: "" })
    expect(result.stderr).toMatch(/^edict: no nix over there.*\n$/)
  })

  test.each(["bash", "fish"] as const)("a login that prints something (%s)", async (shell) => {
    await using p = await project({ host: { shell } })
    const noise = `echo 'welcome back'; printf 'no newline'\n`
    await p.host.sh("mkdir -p .config/fish")
    writeFileSync(p.host.outside("/root/.bashrc"), noise)
    writeFileSync(p.host.outside("/root/.config/fish/config.fish"), noise)
    const result = await p.edict(["h", "nix", "build", ".#chain"])
    expect(result.code).toBe(0)
    expect((await p.sh("cat result/next/next")).stdout).toBe("end\n")
    expect(await p.edict(["h", ".#bump"])).toMatchObject({ code: 0 })
    expect(readFileSync(p.file("new/file.txt"), "utf8")).toBe("new\n")
    writeFileSync(p.file("large.txt"), "large\n".repeat(100_000))
    const sum = await p.edict(["h", ...script("wc -l <large.txt; exit 9")])
    expect([sum.code, sum.stdout.trim().split("\n").at(-1)]).toEqual([9, expect.stringContaining("100000")])
  })

  test("busybox", async () => {
    await using p = await project({ host: { busybox: true } })
    await worksOn(p)
    const running = p.spawn(["h", ...script(BROOD)])
    await running.waitFor("start")
    await running.kill("SIGKILL")
    expect(await leftOf(p)).toEqual([])
  })
})

/** A command with many children: it changes a file, says "start" and goes on for minutes. */
const MILD = `
echo changed >version.txt
setsid sleep 332 &
setsid sh -c 'sleep 333 & sleep 334' &
(sleep 335 &)
echo start
sleep 336
echo went on`

/** The same with a child that only SIGKILL ends. */
const BROOD = `sh -c 'trap "" TERM INT HUP; while :; do sleep 331; done' &${MILD}`

/** What is left of BROOD over there, some seconds later. */
const leftOf = (p: Project, limit = 8_000): Promise<string[]> =>
  eventually(
    async () => (await p.host.processes()).filter((line) => /sleep 33\d|edict\/run/.test(line)),
    (list) => list.length === 0,
    limit,
  )

/** What is left here, but for the connection that waits for the next run. */
const leftHere = (p: Project): Promise<string[]> =>
  eventually(
    async () => (await p.client.processes()).filter((line) => !/ControlMaster=yes|<defunct>/.test(line)),
    (list) => list.length === 0,
    8_000,
  )

describe("signals and lost connections", () => {
  const p = shared({ host: { delay: 0 } })
  let stray: Running

  beforeAll(async () => {
    stray = p().host.spawn(["sleep", "3000"], { timeout: 600_000 })
    expect(await p().edict(["h", "nix", "run", ".#exit7"])).toMatchObject({ code: 7 })
  })

  /** Starts such a command, does something to it, and answers how edict ended. */
  const during = async (
    what: (running: Running) => Promise<void>,
    options: { tty?: boolean; text?: string } = {},
  ): Promise<Result> => {
    await p().sh("git checkout -q .")
    const running = p().spawn(["h", ...script(options.text ?? BROOD)], {
      tty: options.tty ?? false,
      timeout: 60_000,
    })
    await running.waitFor("start")
    await Bun.sleep(100)
    await what(running)
    return running.result
  }

  const version = () => readFileSync(p().file("version.txt"), "utf8")

  const nothingIsLeft = async (limit?: number) => {
    expect(await leftOf(p(), limit)).toEqual([])
    expect(await leftHere(p())).toEqual([])
    expect((await p().host.processes()).filter((line) => line.endsWith("sleep 3000"))).toHaveLength(1)
  }

  test.each([
    ["SIGINT", 130, BROOD],
    ["SIGTERM", 143, MILD],
    ["SIGHUP", 129, MILD],
  ] as const)(
    "%s ends the command and its children with %d, and its changes come home",
    async (signal, code, text) => {
      const result = await during((running) => running.kill(signal), { text })
      expect(result).toMatchObject({ code, stdout: "start\n", held: false })
      expect(foreign(result)).toEqual([])
      expect(version()).toBe("changed\n")
      await nothingIsLeft()
    },
  )

  test("a command that handles Ctrl-C goes on as it likes, and its exit code counts", async () => {
    const text = `trap 'echo caught; exit 3' INT; echo start; while :; do sleep 0.1; done`
    const running = p().spawn(["h", ...script(text)])
    await running.waitFor("start")
    await running.kill("SIGINT")
    expect(await running.result).toMatchObject({ code: 3, stdout: "start\ncaught\n" })
  })

  test("a command that ignores SIGTERM is ended all the same", async () => {
    const running = p().spawn(["h", ...script(`trap '' TERM; echo start; while :; do sleep 337; done`)])
    await running.waitFor("start")
    await running.kill("SIGTERM")
    expect(await running.result).toMatchObject({ code: 137, stdout: "start\n" })
    await nothingIsLeft()
  })

  test("Ctrl-C while Nix builds ends the build", async () => {
    const running = p().spawn(["h", "nix", "build", "--no-link", ".#slow"])
    await running.waitFor("building")
    await Bun.sleep(300)
    await running.kill("SIGINT")
    const result = await running.result
    expect(result.code).not.toBe(0)
    expect(result.stderr).toContain("interrupted")
    expect(
      (
        await eventually(
          () => p().host.processes(),
          (list) => !/sleep 30$/m.test(list.join("\n")),
          8000,
        )
      ).join("\n"),
    ).not.toMatch(/sleep 30$/m)
  })

  test("a second Ctrl-C leaves at once; the next run brings the changes", async () => {
    let began = 0
    const twice = async (running: Running) => {
      await running.kill("SIGINT")
      await Bun.sleep(20)
      began = performance.now()
      await running.kill("SIGINT")
    }
    const text = `trap '' INT; ${MILD}`
    const result = await during(twice, { text })
    expect(performance.now() - began).toBeLessThan(1500)
    expect(result).toMatchObject({ code: 130, held: false })
    await nothingIsLeft()
    const next = await p().edict(["h", ...script("cat version.txt")])
    expect([next.code, next.stdout, version()]).toEqual([0, "changed\n", "changed\n"])
  })

  test("kill -9", async () => {
    const result = await during((running) => running.kill("SIGKILL"))
    expect(result.code).toBe(137)
    expect(result.stdout).toBe("start\n")
    await nothingIsLeft()
    const next = await p().edict(["h", ...script("cat version.txt")])
    expect([next.code, next.stdout, version()]).toEqual([0, "changed\n", "changed\n"])
  })

  test("the connection is cut", async () => {
    const result = await during(() => p().host.dropConnections())
    expect(result).toMatchObject({ code: 255, stdout: "start\n", held: false })
    expect(said(result).at(-1)).toMatch(/^the connection to h was lost/)
    expect(foreign(result)).toEqual([])
    await nothingIsLeft()
    const next = await p().edict(["h", ...script("cat version.txt")])
    expect([next.code, next.stdout, version()]).toEqual([0, "changed\n", "changed\n"])
  })

  test("the network is unplugged", async () => {
    let left: Promise<string[]> | undefined
    const result = await during(async () => {
      await p().host.freeze()
      left = leftOf(p(), 17_000)
    }).finally(async () => {
      await left
      await p().host.freeze()
    })
    expect(await left!).toEqual([])
    expect(result).toMatchObject({ code: 255, stdout: "start\n", held: false })
    expect(said(result).at(-1)).toMatch(/^the connection to h was lost/)
    await nothingIsLeft()
    expect(await p().edict(["h", "nix", "run", ".#exit7"])).toMatchObject({ code: 7 })
  })

  test("Ctrl-C at a terminal: the command gets it there, and its changes come home", async () => {
    const text = `echo changed >version.txt; sh -c 'trap "" INT; sleep 331' & echo start; sleep 336; echo went on`
    await p().sh("git checkout -q .")
    const running = p().spawn(["h", ...script(text)], { tty: true, timeout: 30_000 })
    await running.waitFor("start")
    await Bun.sleep(200)
    running.write("\x03")
    const result = await running.result
    expect(result.code).toBe(130)
    expect(result.stdout).not.toContain("went on")
    expect(version()).toBe("changed\n")
    await nothingIsLeft()
  })

  test("Ctrl-C at a terminal whose output goes into a pipe", async () => {
    await p().sh("git checkout -q .")
    const piped = `${shellWords([EDICT, "h", ...script(MILD)])} 2>/dev/null | cat; echo "code \${PIPESTATUS[0]}"`
    const bash = `trap : INT; ${piped}`
    const running = p().client.spawn(["bash", "-c", bash], { cwd: p().dir, tty: true, timeout: 30_000 })
    await running.waitFor("start")
    await Bun.sleep(200)
    running.write("\x03")
    expect((await running.result).stdout).toContain("code 130")
    await nothingIsLeft()
    expect(version()).toBe("changed\n")
  })

  test("the terminal goes away", async () => {
    const result = await during((running) => running.kill("SIGKILL"), { tty: true })
    expect(result.stdout).toContain("start")
    expect(await leftOf(p())).toEqual([])
    expect(await leftHere(p())).toEqual([])
  })

  test("nothing of all that touched another process of this user", async () => {
    expect((await p().host.processes()).filter((line) => line.endsWith("sleep 3000"))).toHaveLength(1)
    await stray.kill("SIGKILL")
  })
})

describe("the terminal", () => {
  const p = shared()
  const which = `for fd in 0 1 2; do if test -t $fd; then printf 'tty '; else printf 'no '; fi; done; stty size 2>/dev/null || echo none`

  beforeAll(async () => {
    await p().edict(["h", "nix", "build", "--no-link", ".#hello"])
  })

  const plain = (text: string): string => text.replace(/\x1b\[[0-9;?]*[A-Za-z]|\r/g, "")

  test("where all three streams are one, the command has one of the same size", async () => {
    const result = await p().spawn(["-q", "h", ...script(which)], { tty: true }).result
    expect(plain(result.stdout)).toBe("tty tty tty 24 80\n")
    expect(result.code).toBe(0)
  })

  test("pipes are pipes over there", async () => {
    expect((await p().edict(["-q", "h", ...script(which)])).stdout).toBe("no no no none\n")
    const mixed = `${shellWords([EDICT, "-q", "h", ...script(which)])} | cat`
    const result = await p().client.spawn(["sh", "-c", mixed], { cwd: p().dir, tty: true }).result
    expect(plain(result.stdout)).toStartWith("no no no ")
  })

  test("--no-tty and --tty say otherwise", async () => {
    const without = await p().spawn(["-q", "--no-tty", "h", ...script(which)], { tty: true }).result
    expect(plain(without.stdout)).toStartWith("no no no ")
    const forced = await p().edict([
      "-q",
      "--tty",
      "h",
      ...script("test -t 0 && test -t 1 && test -t 2 && echo all; exit 4"),
    ])
    expect([forced.code, plain(forced.stdout)]).toEqual([4, "all\n"])
  })

  test("ssh says nothing of its own", async () => {
    const result = await p().spawn(["h", "nix", "run", ".#both"], { tty: true }).result
    expect(plain(result.stdout)).toContain("to stdout\nto stderr\n")
    expect(result.stdout).not.toMatch(/connection|closed/i)
  })

  test("exit codes pass through", async () => {
    for (const code of [0, 7, 255])
      expect(
        await p().spawn(["h", "nix", "run", ".#status", "--", String(code)], { tty: true }).result,
      ).toMatchObject({ code })
  })

  test("nix develop is a session to work in", async () => {
    const running = p().spawn(["h", "nix", "develop"], { tty: true, timeout: 60_000 })
    await running.waitFor("tree/root/p# ")
    running.write(`echo "$IN_DEV_SHELL-$((40 + 2))" | tee made.txt\n`)
    await running.waitFor("yes-42")
    running.write("exit 3\n")
    expect(await running.result).toMatchObject({ code: 3, held: false })
    expect(readFileSync(p().file("made.txt"), "utf8")).toBe("yes-42\n")
  })
})

describe("the host config", () => {
  const p = shared()
  const config = (text: string) => {
    writeFileSync(p().client.outside("/root/edict.toml"), text)
    return ["--config", "/root/edict.toml"]
  }

  test("env is set for the command, byte for byte", async () => {
    const value = `a  b"'$(id)\\\`id\`é`
    const options = config(`[hosts.h]\nenv = { FOO = ${JSON.stringify(value)}, EMPTY = "" }\n`)
    const { stdout } = await p().edict([
      ...options,
      "h",
      ...script(`printf '%s|%s|' "$FOO" "\${EMPTY-unset}"`),
    ])
    expect(stdout).toBe(`${value}||`)
  })

  test.each([
    ["/tmp/deep/er", "/tmp/deep/er"],
    ["~/other.dir", "/root/other.dir"],
    ["third", "/root/third"],
  ])("directory %s", async (directory, place) => {
    const options = config(`[hosts.h]\ndirectory = "${directory}"\n`)
    const result = await p().edict([...options, "h", ...script("pwd; echo changed >version.txt")])
    expect(result.code).toBe(0)
    expect(result.stdout).toStartWith(`${place}/`)
    expect(result.stdout).toEndWith("/tree/root/p\n")
    expect(readFileSync(p().file("version.txt"), "utf8")).toBe("changed\n")
    await p().sh("git checkout -q .")
    expect(await p().edict([...options, "h", "nix", "build", ".#hello"])).toMatchObject({ code: 0 })
  })

  test("address as a URL, with ssh-options, by another name", async () => {
    const { port } = p().host
    await p().client.sh("mv .ssh/id_ed25519 .ssh/other-key && mv .ssh/config .ssh/no-config")
    const address = `address = "ssh://root@127.0.0.1:${port}"`
    expect(
      await p().edict([...config(`[hosts.big]\n${address}\n`), "big", "nix", "run", ".#exit7"]),
    ).toMatchObject({ code: 255 })
    const options = config(
      `default = "big"\n[hosts.big]\n${address}\nssh-options = ["-i", "~/.ssh/other-key"]\n`,
    )
    expect(await p().edict([...options, "big", "nix", "run", ".#exit7"])).toMatchObject({ code: 7 })
    expect(await p().edict([...options, "nix", "run", ".#exit7"])).toMatchObject({ code: 7 })
    const direct = ["-i", "/root/.ssh/other-key", `ssh://root@127.0.0.1:${port}`]
    expect(await p().edict([...direct, "nix", "build", ".#chain"])).toMatchObject({ code: 0 })
    expect((await p().sh("cat result/next/next")).stdout).toBe("end\n")
    expect(
      await p().edict(["-p", String(port), "-i", "/root/.ssh/other-key", "root@127.0.0.1", ".#exit7"]),
    ).toMatchObject({ code: 7 })
    await p().client.sh("mv .ssh/other-key .ssh/id_ed25519 && mv .ssh/no-config .ssh/config")
  })
})

test("as a script it does the same", async () => {
  await using p = await project()
  const edict = (words: string[], stdin?: string) =>
    p.client.run([...SCRIPT, ...words], { cwd: p.dir, ...(stdin ? { stdin } : {}) })
  expect((await edict(["--version"])).stdout).toBe((await p.edict(["--version"])).stdout)
  expect(readArgs((await edict(["h", ".#args", "--", ...HOSTILE])).stdout)).toEqual(HOSTILE)
  expect(await edict(["h", "nix", "run", ".#cat"], "a\0b")).toMatchObject({ code: 0, stdout: "a\0b" })
  expect(await edict(["h", "nix", "run", ".#exit7"])).toMatchObject({ code: 7 })
  expect(await edict(["h", "nix", "build", ".#hello"])).toMatchObject({ code: 0, stdout: "" })
  expect((await p.sh("cat result")).stdout).toBe("hello\n")
  expect(await edict(["h", ".#bump"])).toMatchObject({ code: 0 })
  expect(readFileSync(p.file("version.txt"), "utf8")).toBe("2\n")
})
