// nom, here, shows the log of a command over there; the rest is as without it.
import { afterAll, beforeAll, describe, expect, setDefaultTimeout, test } from "bun:test"
import { readlinkSync, writeFileSync } from "node:fs"
import { underNom, UsageError } from "../edict"
import type { RunOptions } from "./lab/lab"
import { EDICT, project, type Project } from "./support"

setDefaultTimeout(120_000)

const PATH = "/root/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin:/run/lab/bin"

/** Stands for nix-output-monitor: says how it was called, keeps what it reads, and fails as it does when a build did. */
const FAKE_NOM = `#!/bin/sh
[ ! -t 2 ] || echo "nom: on a terminal" >&2
echo "nom $*" >>/root/nom.calls
tee -a /root/nom.input | while IFS= read -r line; do
  case $line in
    '@nix {'*'}') ;;
    *) printf 'nom passes on: %s\\n' "$line" >&2 ;;
  esac
done
echo "nom: done" # an older one prints to stdout
exit 1
`

const LOG = ["-v", "--log-format", "internal-json"]
const EXIT = ["--command", "sh", "-c", "exit"]

describe("what runs for", () => {
  const cases: [command: string[], first: string[], next: string[] | undefined][] = [
    [["nom", "build", ".#x", "-o", "y"], ["nix", "build", ...LOG, ".#x", "-o", "y"], undefined],
    [["nom-build", "-A", "x"], ["nix-build", ...LOG, "-A", "x"], undefined],
    [
      ["nom", "shell", "a"],
      ["nix", "shell", ...LOG, "a", ...EXIT],
      ["nix", "shell", "a"],
    ],
    [
      ["nom", "develop", ".#x", "-c", "make", "-c"],
      ["nix", "develop", ...LOG, ".#x", ...EXIT],
      ["nix", "develop", ".#x", "-c", "make", "-c"],
    ],
    [
      ["nom", "develop", "--command", "make"],
      ["nix", "develop", ...LOG, ...EXIT],
      ["nix", "develop", "--command", "make"],
    ],
    [
      ["nom-shell", "-p", "x", "--run", "y"],
      ["nix-shell", ...LOG, "-p", "x", "--run", "y", "--run", "exit"],
      ["nix-shell", "-p", "x", "--run", "y"],
    ],
  ]
  test.each(cases)("%j", (command, first, next) => {
    expect(underNom(command)).toEqual({ command: first, monitor: "nom", ...(next && { next }) })
  })

  test.each(["nix build .#x", "nix-shell", "nixos-rebuild build"])("%s: as ever", (line) => {
    expect(underNom(line.split(" "))).toEqual({ command: line.split(" "), monitor: "none" })
  })

  test.each(["nom", "nom --json", "nom run .#x"])("%s is refused", (line) => {
    expect(() => underNom(line.split(" "))).toThrow(UsageError)
  })
})

describe("nom", () => {
  let p: Project

  beforeAll(async () => {
    const files = { "default.nix": "(import ./bash.nix) { }\n", "shell.nix": "(import ./bash.nix) { }\n" }
    p = await project({
      flake: {
        slow: 60,
        files: {
          ...files,
          "bash.nix": `{ }: derivation {
            name = "shell-nix";
            system = builtins.currentSystem;
            builder = "/bin/sh";
            args = [ "-c" "echo built >$out" ];
            PATH = "/bin:/usr/bin";
          }`,
        },
      },
    })
    await p.client.sh("mkdir /root/bin && cat >/root/bin/nom && chmod +x /root/bin/nom", { stdin: FAKE_NOM })
  })

  afterAll(() => p[Symbol.asyncDispose]())

  const edict = (args: string[], options: RunOptions = {}) => p.edict(args, { ...options, env: { PATH } })

  /** What nom was given since the last time. */
  const given = async () => {
    const { stdout } = await p.client.sh("cd; cat nom.calls; cat nom.input; rm -f nom.calls nom.input")
    const lines = stdout.trimEnd().split("\n")
    const [calls, input] = [
      lines.filter((line) => line.startsWith("nom ")),
      lines.filter((line) => !line.startsWith("nom ")),
    ]
    return { calls, input, log: input.filter((line) => line.startsWith("@nix {")) }
  }

  test("build: nom reads the log, stdout stays the command's, the result comes home", async () => {
    const { code, stdout, stderr } = await edict(["h", "nom", "build", ".#hello", "--json"])
    const { calls, input, log } = await given()
    expect({ code, stderr: code === 0 ? "" : stderr }).toEqual({ code: 0, stderr: "" })
    const target = readlinkSync(p.file("result"))
    expect(JSON.parse(stdout)).toMatchObject([{ outputs: { out: target } }])
    expect((await p.sh("cat result")).stdout).toBe("hello\n")
    expect(calls).toEqual(["nom --json"])
    expect(input).toEqual(log)
    for (const line of log) JSON.parse(line.slice("@nix ".length))
    expect(log.join("\n")).toContain("-hello.drv")
    // What nom prints to its stdout goes where its stderr goes.
    expect(stderr).toStartWith("nom: done\n")
    expect(stderr.trimEnd().split("\n").at(-1)).toBe(`edict: result -> ${target}`)
    expect(stderr).not.toContain("@nix")
  })

  test("the exit code is that of nix, and the error is in the log", async () => {
    const { code, stdout } = await edict(["h", "nom", "build", ".#fails", "--no-link"])
    expect({ code, stdout }).toEqual({ code: 1, stdout: "" })
    expect((await given()).log.join("\n")).toContain("failing on purpose")
  })

  test("nom-build", async () => {
    const { code, stdout } = await edict(["h", "nom-build", "-o", "built"])
    expect({ code, stdout }).toEqual({ code: 0, stdout: `${readlinkSync(p.file("built"))}\n` })
    expect((await given()).log.length).toBeGreaterThan(0)
    await p.sh("rm built")
  })

  test("shell: built under nom, then run as it is, with stdin and exit code", async () => {
    const bytes = new Uint8Array(70_000).map((_, at) => at)
    const cat = await edict(["h", "nom", "shell", ".#status", "-c", "cat"], { stdin: bytes })
    expect(cat.code).toBe(0)
    expect(Buffer.compare(cat.bytes, bytes)).toBe(0)
    const { calls, log } = await given()
    expect(calls).toEqual(["nom --json"])
    expect(log.length).toBeGreaterThan(0)

    const status = await edict(["h", "nom", "shell", ".#status", "-c", "status", "7"])
    expect(status).toMatchObject({ code: 7, stdout: "" })
    await given()

    const failed = await edict(["h", "nom", "shell", ".#fails", "-c", "echo", "never"])
    expect(failed).toMatchObject({ code: 1, stdout: "" })
    expect((await given()).calls).toEqual(["nom --json"])
  })

  test("develop: on a terminal its second run has one", async () => {
    const running = p.spawn(["h", "nom", "develop", "-c", "sh", "-c", 'echo "$IN_DEV_SHELL"; tty'], {
      tty: true,
      env: { PATH },
    })
    running.end()
    const { code, stdout } = await running.result
    expect({ code, stdout }).toMatchObject({ code: 0 })
    expect(stdout).toMatch(/nom: on a terminal\r\n[^]*nom: done\r\n[^]*yes\r\n\/dev\/pts\/\d+\r\n/)
    await given()
  })

  test("nom-shell takes shell.nix before default.nix, as nix-shell does", () => {
    const { stdout } = Bun.spawnSync([EDICT, "--dry-run", "--json", "h", "nom-shell"], {
      cwd: p.client.outside("/root/p"),
    })
    expect(JSON.parse(stdout.toString())).toMatchObject({
      command: ["nix-shell", ...LOG, "--run", "exit"],
      next: ["nix-shell"],
      monitor: ["nom", "--json"],
    })
  })

  test("its own words are references as those of nix are", async () => {
    const { code } = await p.sh(
      `mkdir -p /root/elsewhere && cd /root/elsewhere && PATH=${PATH} && edict h nom build ../p#hello -o out`,
    )
    expect(code).toBe(0)
    expect(readlinkSync(p.client.outside("/root/elsewhere/out"))).toEndWith("-hello")
    await given()
  })

  test("what is no log goes through nom, and past it when it is gone", async () => {
    const shut = `#!/bin/sh\nread -r line\necho "nom: crashed" >&2\nexit 139\n`
    writeFileSync(p.client.outside("/root/bin/nom"), shut)
    const { code, stdout, stderr } = await edict(["h", "nom", "build", ".#hello", "-o", "past"])
    expect({ code, stdout }).toEqual({ code: 0, stdout: "" })
    expect(stderr).toMatch(/^nom: crashed\n(@nix \{.*\}\n)+edict: past -> /)
    writeFileSync(p.client.outside("/root/bin/nom"), FAKE_NOM)
    await p.sh("rm -f past")
  })

  test("Ctrl-C ends the build over there, and nom", async () => {
    const running = p.spawn(["h", "nom", "build", ".#slow"], { env: { PATH } })
    await Bun.sleep(500)
    for (let i = 0; i < 200 && !(await p.host.processes()).some((line) => line.includes("sleep 60")); i++)
      await Bun.sleep(100)
    await running.kill("SIGINT")
    const { code, stderr } = await running.result
    expect(code).toBe(130)
    expect(stderr).toContain("nom: done")
    expect((await p.host.processes()).filter((line) => line.includes("sleep 60"))).toEqual([])
    expect((await p.client.processes()).filter((line) => line.includes("nom"))).toEqual([])
    await given()
  })

  test("no nom here: one line, and nothing ran", async () => {
    const { code, stdout, stderr } = await p.edict(["h", "nom", "build", ".#hello"], {
      env: { PATH: PATH.replace("/root/bin:", "") },
    })
    expect({ code, stdout }).toEqual({ code: 254, stdout: "" })
    expect(stderr).toMatch(
      /^edict: no nom here to show the log; try: nix profile install \S+#nix-output-monitor.*\n$/,
    )
  })

  test("several hosts: refused, with what to type", async () => {
    const { code, stderr } = await edict(["h,root@h2", "nom", "build", ".#hello", "-o", "a b"])
    expect(code).toBe(254)
    expect(stderr).toBe(
      "edict: nom shows the log of one host; try: name one of them, or without nom: edict h,root@h2 nix build '.#hello' -o 'a b'\n",
    )
  })

  test("--dry-run shows both, as lines that a shell takes", async () => {
    const { code, stdout } = await edict(["-n", "h", "nom", "shell", "github:a/b"])
    expect(code).toBe(0)
    const line = /^\{ ssh .*$/m.exec(stdout)?.[0] ?? ""
    expect(line).toContain(" && nix shell -v --log-format internal-json github:a/b --command sh -c exit'")
    expect(stdout).toMatch(/^ssh -- h 'cd \S+ && nix shell github:a\/b'$/m)
    const fakes = 'ssh() { echo out; echo "$3" >&2; }; nom() { echo "<$(cat)>"; }'
    const run = await p.client.run(["bash", "-c", `${fakes}; ${line}`])
    expect(run.stdout).toBe("out\n")
    expect(run.stderr).toMatch(/^<cd .*--command sh -c exit>\n$/)
  })

  test("the real one", async () => {
    const real = Bun.which("nom")
    if (!real) return console.log("skipped: no nix-output-monitor here")
    const { code, stdout, stderr } = await p.edict(["h", "nom", "build", ".#hello"], {
      env: { PATH: `${real.replace(/\/nom$/, "")}:${PATH.replace("/root/bin:", "")}` },
    })
    expect({ code, stdout }).toEqual({ code: 0, stdout: "" })
    expect(stderr).toContain("Finished")
  })
})
