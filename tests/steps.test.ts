// The line that says what is being done, the one that says what came home, -v, -q, and --report.
import { afterAll, beforeAll, describe, expect, test } from "bun:test"
import {
  chmodSync,
  existsSync,
  lstatSync,
  mkdirSync,
  readdirSync,
  readFileSync,
  statSync,
  symlinkSync,
  writeFileSync,
} from "node:fs"
import { join } from "node:path"
import { closingLine, duration, stepLine } from "../edict"
import { REPOSITORY, shellWords, type Result, type RunOptions } from "./lab/lab"
import { EDICT, project, type Project } from "./support"

// ── What a terminal shows ───

/** The lines of a terminal after all that was written to it; it wraps at the 81st character, as xterm does. */
function screenOf(written: string, columns = 80): string[] {
  const rows: string[][] = [[]]
  let [row, column] = [0, 0]
  const down = () => {
    row++
    rows[row] ??= []
  }
  for (const [token] of written.matchAll(/\x1b\[[0-9;?]*[A-Za-z]|[^]/gu)) {
    if (token === "\r") column = 0
    else if (token === "\n") down()
    else if (token === "\x1b[K") rows[row]!.splice(column)
    else if (!token.startsWith("\x1b")) {
      if (column === columns) [column] = [0, down()]
      rows[row]![column++] = token
    }
  }
  return rows.map((cells) =>
    Array.from(cells, (cell) => cell ?? " ")
      .join("")
      .trimEnd(),
  )
}

/** The lines that came and went, without how long they did. */
const stepsIn = (written: string): string[] => {
  const all = [...written.matchAll(/\r\x1b\[Kedict: ([a-z ]+)(?:, \d+ s)?(?=\r)/g)].map(([, step]) => step!)
  return all.filter((step, at) => step !== all[at - 1])
}

const TTY = { tty: true }

/** The program in the client that runs in place of the real one, with `real` as that one. */
async function wrap(p: Project, program: string, script: string): Promise<void> {
  const text = `#!/bin/sh\nreal=/usr/bin/${program}\n${script}\nexec "$real" "$@"\n`
  const file = `/usr/local/bin/${program}`
  await p.client.sh(`cat >${file}.new && chmod 755 ${file}.new && mv ${file}.new ${file}`, { stdin: text })
}

const unwrap = (p: Project, ...programs: string[]) =>
  p.client.sh(`cd /usr/local/bin && rm -f ${programs.join(" ")}`)

const onHost = (script: string): string[] => ["nix", "shell", ".#hello", "-c", "sh", "-c", script]

function shared(): () => Project {
  let p: Project | undefined
  beforeAll(async () => {
    p = await project()
    await p.edict(["h", ...onHost("true")])
  })
  afterAll(async () => p?.[Symbol.asyncDispose]())
  return () => p!
}

describe("stepLine", () => {
  const at = (label: string, since: number) => ({ label, since })

  test.each<[{ label: string; since: number }[], string]>([
    [[], ""],
    [[at("scan", 9800)], ""],
    [[at("scan", 9700)], "edict: scan"],
    [[at("scan", 9000)], "edict: scan, 1 s"],
    [[at("results from h", 1000), at("sync back from h", 9900)], "edict: results from h, 9 s"],
    [
      [at("results from h", 0), at("sync back from h", 9000)],
      "edict: results from h, sync back from h, 10 s",
    ],
    [[at("upload to h", 10_000 - 3_725_000)], "edict: upload to h, 1 h 2 min"],
  ])("%j", (active, line) => {
    expect(stepLine(active, 10_000)).toBe(line)
  })
})

describe("duration", () => {
  test.each([
    [0.04, "0.0 s"],
    [3.25, "3.3 s"],
    [9.96, "10 s"],
    [59.4, "59 s"],
    [59.6, "1 min 0 s"],
    [200, "3 min 20 s"],
    [7500, "2 h 5 min"],
  ])("%d", (seconds, text) => {
    expect(duration(seconds)).toBe(text)
  })
})

describe("closingLine", () => {
  const link = (name: string) => ({ link: `/p/${name}`, target: "/nix/store/x" })
  const none = { resultLinks: [], changed: [], refs: [] }
  const materialized = { directory: "/p/out", files: 1, bytes: 1, skipped: {} }

  test.each<[Partial<Parameters<typeof closingLine>[0]>, number, string]>([
    [{}, 1.9, ""],
    [{}, 2, "nothing came home (2.0 s)"],
    [{ resultLinks: [link("result")] }, 0.3, "result -> /nix/store/x (0.3 s)"],
    [{ resultLinks: [link("a"), link("../b")] }, 0.3, "2 result links: a, ../b (0.3 s)"],
    [{ resultLinks: ["a", "b", "c", "d"].map(link) }, 0.3, "4 result links: a, b, c, … (0.3 s)"],
    [{ materialized }, 0.3, "out holds 1 file (0.3 s)"],
    [{ changed: ["a\x1b"] }, 0.3, "1 file changed here: a\\x1b (0.3 s)"],
    [{ changed: ["a", "b", "c", "d"] }, 0.3, "4 files changed here: a, b, c, … (0.3 s)"],
    [{ refs: ["refs/heads/main", "refs/tags/v1"] }, 0.3, "git: main, v1 moved here (0.3 s)"],
    [
      { resultLinks: [link("r")], changed: ["a"], refs: ["HEAD"] },
      64,
      "r -> /nix/store/x; 1 file changed here: a; git: HEAD moved here (1 min 4 s)",
    ],
  ])("%j", (report, seconds, line) => {
    expect(closingLine({ ...none, ...report }, { cwd: "/p", seconds })).toBe(line)
  })
})

describe("on a terminal", () => {
  const p = shared()

  /** Runs edict on a terminal with stages that take their time: each of these programs waits first. */
  const slowly = async (
    slow: Record<string, string>,
    args: string[],
    options: RunOptions & { tty?: boolean } = TTY,
  ): Promise<Result> => {
    for (const [program, script] of Object.entries(slow)) await wrap(p(), program, script)
    const running = p().spawn(args, options)
    running.end()
    const result = await running.result
    await unwrap(p(), ...Object.keys(slow))
    return result
  }

  const SLOW_SCAN = { git: `case $* in *--others*) sleep 1.2 ;; esac` }

  test("a step shows while it takes long, and is gone before the command says anything", async () => {
    const script = `printf one; sleep 1; echo two; printf three`
    const { code, stdout } = await slowly(SLOW_SCAN, ["h", ...onHost(script)])
    expect(code).toBe(0)
    expect(stepsIn(stdout)[0]).toBe("scan")
    const [before, after] = stdout.split("one")
    expect(screenOf(before!).join("")).not.toContain("edict:")
    expect(after!.split("three")[0]).not.toContain("edict:")
    const lines = screenOf(stdout).filter((line) => !line.includes("warning: Git tree"))
    expect(lines.slice(0, 2)).toEqual(["onetwo", "three"])
    expect(lines[2]).toMatch(/^edict: nothing came home \([0-9.]+ s\)$/)
    expect(lines.slice(3)).toEqual([""])
  })

  test("the line at the end stands on a line of its own, whatever the command left", async () => {
    await p().sh("git checkout -q . && head -c 100000 /dev/urandom >big && git add big")
    const slow = { rsync: "sleep 0.5", tar: "sleep 0.5" }
    const script = `echo 2 >version.txt; printf 'no end'`
    const { code, stdout } = await slowly(slow, ["h", ...onHost(script)])
    expect(code).toBe(0)
    expect(stepsIn(stdout)).toEqual(["upload to h", "sync back from h"])
    const lines = screenOf(stdout).filter((line) => !line.includes("warning: Git tree"))
    expect(lines[0]).toBe("no end")
    expect(lines[1]).toMatch(/^edict: 1 file changed here: version\.txt \([0-9.]+ s\)$/)
    expect(lines.slice(2)).toEqual([""])
    await p().sh("git rm -qf big; git checkout -q .")
  })

  test("a stage that takes no time does not show, nor does a short run that brings nothing home", async () => {
    const file = p().client.outside("/root/r.json")
    const { stdout } = await p().spawn(["--report", "/root/r.json", "h", ...onHost("echo ok")], TTY).result
    const { milliseconds, stages } = JSON.parse(readFileSync(file, "utf8")) as ReportFile
    const slow = stages.filter((one) => one.milliseconds > 290).map(({ stage }) => stage)
    for (const step of stepsIn(stdout)) expect(slow).toContain(step.replace(/ (to|from) h$/, ""))
    if (milliseconds < 1900) expect(stdout).not.toContain("edict:")
  })

  test("a result link: one line that says where it leads and how long it took", async () => {
    const { stdout } = await p().spawn(["h", "nix", "build", ".#hello"], TTY).result
    const own = screenOf(stdout).filter((line) => line.startsWith("edict:"))
    expect(own).toHaveLength(1)
    // It may be longer than the terminal is wide.
    expect(screenOf(stdout, 200).join("\n")).toMatch(
      /^edict: result -> \/nix\/store\/\S+-hello \([0-9.]+ s\)$/m,
    )
  })

  test("an interactive program has the terminal for itself", async () => {
    const script = `printf 'name? '; read name; sleep 1; echo "hello $name"`
    const running = p().spawn(["h", ...onHost(script)], TTY)
    await running.waitFor("name? ")
    await Bun.sleep(1000)
    running.write("Ada\n")
    const { stdout } = await running.result
    const [, during = ""] = stdout.split("name? ")
    expect(during).toMatch(/^Ada\r\nhello Ada\r\n/)
  })

  test("while ssh may ask for a password nothing shows", async () => {
    await p().client.sh("ssh -o ControlPath=/tmp/edict-0/$(ls /tmp/edict-0 | grep -v lock) -O exit h")
    const ssh = `case " $* " in *" -N "*) printf "root@h's password: " >/dev/tty; read _ </dev/tty ;; esac`
    for (const [program, script] of Object.entries({ ...SLOW_SCAN, ssh })) await wrap(p(), program, script)
    const running = p().spawn(["h", ...onHost("echo ok")], TTY)
    await running.waitFor("password: ")
    await Bun.sleep(1500)
    expect(running.stdout).toBe("root@h's password: ")
    running.write("secret\n")
    const { code, stdout } = await running.result
    await unwrap(p(), "git", "ssh")
    expect(code).toBe(0)
    expect(screenOf(stdout)[0]).toStartWith("root@h's password: ")
    expect(screenOf(stdout)).toContain("ok")
  })

  test("Ctrl-C in a slow step takes its line away", async () => {
    await wrap(p(), "git", `case $* in *--others*) sleep 20 ;; esac`)
    const running = p().spawn(["--report", "/root/r.json", "h", ...onHost("true")], TTY)
    await running.waitFor("edict: scan")
    running.write("\x03")
    const { code, stdout } = await running.result
    await unwrap(p(), "git")
    expect(code).toBe(130)
    expect(screenOf(stdout).join("\n").replaceAll("^C", "")).toBe("")
    const report = JSON.parse(readFileSync(p().client.outside("/root/r.json"), "utf8")) as ReportFile
    expect(report).toMatchObject({ host: "h", exitCode: 130, signal: "SIGINT" })
  })

  test("a job in the background leaves the terminal alone", async () => {
    for (const [program, script] of Object.entries(SLOW_SCAN)) await wrap(p(), program, script)
    const job = `set -m; ${shellWords([EDICT, "--no-tty", "h", ...onHost("echo ok")])} </dev/null & wait`
    const running = p().client.spawn(["bash", "-c", job], { cwd: p().dir, tty: true })
    const { stdout } = await running.result
    await unwrap(p(), "git")
    expect(stdout).toContain("ok")
    expect(stepsIn(stdout)).toEqual([])
  })

  const changes = onHost("echo hi >&2; echo 2 >version.txt; git commit -qam second")
  test.each<[string, string[], RunOptions & { tty?: boolean }, RegExp | ""]>([
    [
      "NO_COLOR",
      [],
      { ...TTY, env: { NO_COLOR: "1" } },
      /^edict: 1 file changed here: version\.txt; git: main moved here \([0-9.]+ s\)\n$/,
    ],
    [
      "TERM=dumb",
      [],
      { ...TTY, env: { TERM: "dumb" } },
      /^edict: git: refs\/heads\/main moved here\nedict: 1 file changed here: version\.txt\n$/,
    ],
    [
      "no terminal",
      [],
      {},
      /^edict: git: refs\/heads\/main moved here\nedict: 1 file changed here: version\.txt\n$/,
    ],
    ["-q", ["-q"], TTY, ""],
    ["-q without a terminal", ["-q"], {}, ""],
  ])("%s: plain text, and nothing that moves", async (_, words, how, said) => {
    const args = ["--no-tty", ...words, "h", ...changes]
    const { code, stdout, stderr } = await slowly({ tar: "sleep 0.6" }, args, how)
    const all = (stdout + stderr).replaceAll("\r\n", "\n")
    expect([code, code === 0 ? "" : all]).toEqual([0, ""])
    await p().sh("git reset -q --hard HEAD~1")
    expect(all).not.toMatch(/[\x1b\r]/)
    const own = all.split("\n").filter((line) => line.startsWith("edict:"))
    const text = own.map((line) => `${line}\n`).join("")
    if (said === "") expect(text).toBe("")
    else expect(text).toMatch(said)
  })

  test("of several hosts each line is whole, and a table ends them", async () => {
    const hosts = "h,root@nowhere.invalid"
    const { stdout } = await slowly(SLOW_SCAN, [hosts, ...onHost("echo one; sleep 0.5; echo two")])
    expect(stdout).not.toMatch(/\x1b\[K|edict: (scan|nothing)/)
    const lines = screenOf(stdout, 400).filter((line) => line !== "")
    for (const line of lines) expect(line).toMatch(/^(h +│ |root@nowhere.invalid │ |edict: )/)
    expect(lines.filter((line) => line.startsWith("edict:"))).toHaveLength(3)
  })

  test("a real terminal shows the same (tmux)", async () => {
    if (Bun.which("tmux") === null) return console.warn("steps: no tmux here, so no real terminal was asked")
    const edict = (script: string) => shellWords([EDICT, "h", ...onHost(script)])
    const lines = [
      edict("printf 'no end'; echo 2 >version.txt"),
      edict("echo an end; echo 3 >version.txt"),
      `printf '%s' ${"x".repeat(80)}`,
      "echo; sleep 60",
    ]
    writeFileSync(p().client.outside("/root/t.sh"), lines.join("\n"))
    const tmux = (words: string) => p().client.sh(`tmux -L steps -f /dev/null ${words}`, { cwd: p().dir })
    await tmux(`new-session -d -x 80 -y 24 'sh /root/t.sh'`)
    const pane = async () => (await tmux("capture-pane -p -t 0")).stdout
    for (let seen = ""; !seen.includes("x".repeat(80)); seen = await pane()) await Bun.sleep(100)
    const shown = (await pane()).split("\n").filter((line) => !line.includes("warning: Git tree"))
    await tmux("kill-server")
    expect(shown[0]).toBe("no end")
    expect(shown[1]).toMatch(/^edict: 1 file changed here: version\.txt \([0-9.]+ s\)$/)
    expect(shown[2]).toBe("an end")
    expect(shown[3]).toMatch(/^edict: 1 file changed here: version\.txt \([0-9.]+ s\)$/)
    await p().sh("git checkout -q .")
  })
})

const STAGES = ["connect", "scan", "upload", "run", "results", "sync back"]

type ReportFile = Record<string, unknown> & {
  exitCode: number | null
  milliseconds: number
  stages: { stage: string; milliseconds: number }[]
}

describe("-v", () => {
  const p = shared()
  const PROGRAMS = ["git", "ssh", "rsync", "xargs", "nix-store"]

  test("every process that edict starts is traced, and every request to the other side, with its time", async () => {
    await p().sh("head -c 100000 /dev/urandom >big && git add big")
    // Those that a shell starts, in a pipeline or another program, are part of what is traced for that.
    const noting = (program: string) =>
      `case $(cat /proc/$PPID/comm) in edict) printf '%s\\n' "$(echo "${program} $*" | tr '\\n' ' ')" >>/tmp/started ;; esac`
    for (const program of PROGRAMS) await wrap(p(), program, noting(program))
    const { code, stderr } = await p().edict(["-v", "h", "nix", "build", ".#many"])
    await unwrap(p(), ...PROGRAMS)
    await p().sh("git rm -qf big; rm -f result")
    expect(code).toBe(0)
    const traced = stderr.split("\n").filter((line) => line.startsWith("edict: + "))
    const started = (await p().client.sh("cat /tmp/started; rm /tmp/started")).stdout.trim().split("\n")
    const count = (lines: string[], program: string) =>
      lines.filter((line) => line.replace("edict: + ", "").startsWith(`${program} `)).length
    const counts = (lines: string[]) => PROGRAMS.map((program) => [program, count(lines, program)])
    expect(counts(traced)).toEqual(counts(started))
    for (const program of PROGRAMS) expect([program, count(traced, program) > 0]).toEqual([program, true])
    const asked = traced.flatMap(
      (line) => /^edict: \+ <agent> (\w+).* {3}# \d+\.\d\d s$/.exec(line)?.[1] ?? [],
    )
    expect(asked).toEqual(expect.arrayContaining(["hello", "tree", "commit", "run"]))
    // The agent itself is there for all of the run: it is named when it starts.
    const timeless = traced.filter((line) => !/ {3}# \d+\.\d\d s$/.test(line))
    expect(timeless).toHaveLength(1)
    expect(timeless[0]).toMatch(/^edict: \+ ssh .* -- h <agent>$/)
    expect(traced.join("\n")).toMatch(/bash -c .*nix-store --import.* {3}# /)
    for (const stage of STAGES) expect(stderr).toMatch(new RegExp(`^edict: ${stage}: \\d+\\.\\d\\d s$`, "m"))
  })

  test("without -v there is no trace, and of errors -q leaves all", async () => {
    const plain = await p().edict(["h", ...onHost("true")])
    expect(plain.stderr).not.toContain("+ ")
    for (const words of [["-q"], ["-q", "-v"]]) {
      const failed = await p().edict([...words, "root@nowhere.invalid", ...onHost("true")])
      expect(failed).toMatchObject({ code: 255, stdout: "" })
      expect(failed.stderr).toMatch(/^edict: cannot reach root@nowhere\.invalid: .*\n$/)
    }
  })
})

describe("--report", () => {
  const p = shared()
  const seen = new Set<string>()

  /** The names of all fields, as the README writes them: `stages[].stage`. */
  const fieldsOf = (value: unknown, name = ""): string[] => {
    if (Array.isArray(value)) return value.flatMap((item) => fieldsOf(item, `${name}[]`))
    if (typeof value !== "object" || value === null || name === "materialized.skipped") return [name]
    return Object.entries(value).flatMap(([key, inner]) =>
      fieldsOf(inner, name === "" ? key : `${name}.${key}`),
    )
  }

  const read = (name = "r.json"): ReportFile => {
    const report = JSON.parse(readFileSync(p().client.outside(`/root/${name}`), "utf8")) as unknown
    for (const one of [report].flat()) for (const field of fieldsOf(one)) seen.add(field)
    return report as ReportFile
  }

  const reported = async (words: string[], options?: RunOptions): Promise<[Result, ReportFile]> => {
    await p().client.sh("rm -f /root/r.json")
    const result = await p().edict(["--report", "/root/r.json", ...words], options)
    return [result, read()]
  }

  test("a run that went well", async () => {
    await p().sh("head -c 100000 /dev/urandom >big && git add big")
    const script = `printf 12345 >new.txt; git add new.txt version.txt; git commit -qm second`
    const [{ code }, report] = await reported(["h", ...onHost(script)])
    expect(code).toBe(0)
    expect(report).toEqual({
      host: "h",
      exitCode: 0,
      milliseconds: expect.any(Number),
      stages: STAGES.map(() => ({
        stage: expect.any(String),
        milliseconds: expect.any(Number),
      })),
      bytesUp: expect.any(Number),
      bytesDown: expect.any(Number),
      resultLinks: [],
      changed: ["new.txt"],
      refs: ["refs/heads/main"],
      conflicts: [],
      notes: [],
    })
    const stages = report.stages.map(({ stage }) => stage).toSorted()
    expect(stages).toEqual(STAGES.toSorted())
    const { bytesUp, bytesDown, milliseconds } = report as unknown as Record<string, number>
    expect(bytesUp).toBeGreaterThan(100_000)
    expect(bytesUp).toBeLessThan(300_000) // as a file, and as what is staged
    expect(bytesDown).toBeGreaterThan(5) // the file, and a pack with the commit
    for (const stage of report.stages) expect(stage.milliseconds).toBeLessThanOrEqual(milliseconds!)
    await p().sh("git reset -q --hard HEAD~1; rm -f big new.txt")
  })

  test("a result link, and nothing that went over", async () => {
    await p().edict(["h", ...onHost("true")])
    const [, report] = await reported(["h", "nix", "build", ".#hello"])
    const target = expect.stringMatching(/^\/nix\/store\/.*-hello$/)
    expect(report).toMatchObject({ bytesUp: 0, resultLinks: [{ link: "/root/p/result", target }] })
    expect(report["bytesDown"]).toBeGreaterThan(0)
    const [, again] = await reported(["h", "nix", "build", ".#hello"])
    expect(again).toMatchObject({ bytesDown: 0, resultLinks: [{ link: "/root/p/result", target }] })
  })

  test("plain files instead of a link", async () => {
    const [{ code }, report] = await reported(["--materialize", "/root/out", "h", "nix", "build", ".#hello"])
    expect(code).toBe(0)
    expect(report["materialized"]).toMatchObject({ directory: "/root/out", skipped: {} })
  })

  test("the command failed", async () => {
    const [{ code }, report] = await reported(["h", ...onHost("echo 2 >version.txt; exit 7")])
    expect([code, report.exitCode, report["changed"]]).toEqual([7, 7, ["version.txt"]])
    expect(report).not.toHaveProperty("error")
    await p().sh("git checkout -q .")
  })

  test("conflicts", async () => {
    const running = p().spawn([
      "--report",
      "/root/r.json",
      "h",
      ...onHost("echo theirs >version.txt; git commit -qam theirs; echo started; read _"),
    ])
    await running.waitFor("started")
    await p().sh("echo ours >version.txt; git commit -qam ours")
    running.write("\n")
    expect((await running.result).code).toBe(254)
    const report = read()
    expect(report.exitCode).toBe(254)
    const kept = expect.stringMatching(/^\.git\/edict\/conflicts\/.*version\.txt$/)
    expect(report["conflicts"]).toEqual([
      { file: "version.txt", why: expect.any(String), kept },
      { file: "refs/heads/main", why: expect.any(String), hint: "git merge refs/edict/h/heads/main" },
    ])
    await p().sh("git reset -q --hard HEAD~1")
  })

  test.each<[string, string[], number, RegExp]>([
    [
      "a host that is not there",
      ["root@nowhere.invalid", "nix", "--version"],
      255,
      /^cannot reach root@nowhere/,
    ],
    ["a flake that is not there", ["h", "nix", "build", "./none"], 254, /./],
    [
      "a hosts file that is wrong",
      ["--config", "/root/wrong.toml", "h", "nix", "--version"],
      254,
      /wrong\.toml/,
    ],
    [
      "a link that cannot be made",
      ["h", "nix", "build", ".#hello", "-o", "/root/taken"],
      254,
      /^\/root\/taken is no link into the store/,
    ],
  ])("edict fails: %s", async (_, words, code, error) => {
    writeFileSync(p().client.outside("/root/wrong.toml"), "nonsense = 1\n")
    writeFileSync(p().client.outside("/root/taken"), "mine\n")
    const [result, report] = await reported(words)
    expect([result.code, report.exitCode]).toEqual([code, code])
    expect(report["error"]).toMatch(error)
    expect(result.stderr).toContain(`edict: ${String(report["error"])}`)
  })

  test("signals: one that the command gets, and a second one that ends edict at once", async () => {
    const started = async (script: string) => {
      const running = p().spawn(["--report", "/root/r.json", "h", ...onHost(script)])
      await running.waitFor("started")
      return running
    }
    const polite = await started(`trap 'exit 9' TERM; echo started; while :; do sleep 0.1; done`)
    await polite.kill("SIGTERM")
    expect((await polite.result).code).toBe(9)
    expect(read()).toMatchObject({ exitCode: 9, signal: "SIGTERM" })
    const stubborn = await started(`trap '' INT; echo started; while :; do sleep 0.1; done`)
    await stubborn.kill("SIGINT")
    await Bun.sleep(300)
    await stubborn.kill("SIGINT")
    expect((await stubborn.result).code).toBe(130)
    expect(read()).toMatchObject({ host: "h", exitCode: 130, signal: "SIGINT" })
  })

  test("of several hosts a list", async () => {
    const words = ["--jobs", "1", "--fail-fast", "root@nowhere.invalid,h", "nix", "--version"]
    const [, report] = await reported(words)
    const dead = { host: "root@nowhere.invalid", state: "ended", seconds: expect.any(Number), exitCode: 255 }
    expect(report).toMatchObject([
      { ...dead, error: expect.stringMatching(/^cannot reach/) },
      { host: "h", state: "not run", seconds: 0, exitCode: null },
    ])
  })

  test.each<[string, string, RegExp]>([
    [
      "in a directory that is not there",
      "/root/no/r.json",
      /No such file|ENOENT.*; try: mkdir -p \/root\/no\n$/,
    ],
    ["that is a directory", "/root", /directory.*; try: another --report FILE\n$/],
    ["on a file system that nobody writes to", "/proc/sys/r.json", /; try: another --report FILE\n$/],
    ["that is read-only", "/sys/kernel/notes", /; try: another --report FILE\n$/],
  ])("a file %s is refused before anything runs", async (_, file, why) => {
    const before = p().host.log().length
    const many = ["h", "h,root@nowhere.invalid"]
    for (const host of many) {
      const result = await p().edict(["--report", file, host, ...onHost("echo ran >version.txt")])
      expect(result).toMatchObject({ code: 254, stdout: "" })
      expect(result.stderr).toStartWith(`edict: the report cannot be written to ${file}: `)
      expect(result.stderr).toMatch(why)
      expect(result.stderr.split("\n")).toHaveLength(2)
    }
    expect(p().host.log().slice(before)).toBe("")
    expect(readFileSync(p().file("version.txt"), "utf8")).toBe("1\n")
  })

  test("the file is replaced as a whole: links, mode and neighbours stay, readers see the old or the new", async () => {
    const directory = p().client.outside("/root/reports")
    mkdirSync(directory)
    writeFileSync(join(directory, "real.json"), "old\n")
    chmodSync(join(directory, "real.json"), 0o600)
    symlinkSync("real.json", join(directory, "link.json"))
    const { ino } = statSync(join(directory, "real.json"))
    expect((await p().edict(["--report", "/root/reports/link.json", "h", "nix", "--version"])).code).toBe(0)
    expect(readdirSync(directory).toSorted()).toEqual(["link.json", "real.json"])
    expect(lstatSync(join(directory, "link.json")).isSymbolicLink()).toBeTrue()
    const after = statSync(join(directory, "real.json"))
    expect([after.ino === ino, after.mode & 0o777]).toEqual([false, 0o600])
    expect(read("reports/link.json").exitCode).toBe(0)
    const version = ["h", "nix", "--version"]
    expect((await p().edict(["--report", "/root/reports/new.json", ...version])).code).toBe(0)
    expect(statSync(join(directory, "new.json")).mode & 0o777).toBe(0o644)
  })

  test("a pipe, and what is open already, get it, too", async () => {
    const run = shellWords(["h", "nix", "--version"])
    const piped = await p().client.run(
      ["bash", "-c", `'${EDICT}' -q --report >(cat >/root/r.json) ${run}; wait $!`],
      {
        cwd: p().dir,
      },
    )
    expect(piped.code).toBe(0)
    expect(read().exitCode).toBe(0)
    const both = await p().sh(
      `edict -q --report /dev/stderr ${run} 2>/root/r.json; edict -q --report /dev/stdout ${run} >/root/both`,
    )
    expect(both.code).toBe(0)
    expect(read().exitCode).toBe(0)
    expect(readFileSync(p().client.outside("/root/both"), "utf8")).toMatch(
      /^nix \(Nix\) .*\n\{\n {2}"host": "h",/,
    )
  })

  // These two compare with the reports of all tests above.
  const table = readFileSync(join(REPOSITORY, "README.md"), "utf8")
    .split("## Report\n")[1]!
    .split("\n## ")[0]!
  const documented = [...table.matchAll(/^\| `([^`]+)` +\|/gm)].map(([, field]) => field!)

  test("the README's table has the fields of real reports, and no others", () => {
    const empty = [...seen].filter((field) => ![...seen].some((other) => other.startsWith(`${field}[].`)))
    expect(empty.toSorted()).toEqual(documented.toSorted())
  })

  test("so does the type, with a comment on each", () => {
    const source = readFileSync(join(REPOSITORY, "edict.ts"), "utf8")
    const type = /^export type Report = \{\n([^]*?)^\}/m.exec(source)![1]!
    const fields = [...type.matchAll(/^ {2}\/\*\* .* \*\/\n {2}(\w+)\??:/gm)].map(([, field]) => field!)
    expect(fields).toHaveLength(type.match(/^ {2}\w+\??:/gm)!.length)
    const ofOne = documented.filter((field) => !["state", "seconds"].includes(field))
    expect(fields.toSorted()).toEqual([...new Set(ofOne.map((field) => /^\w+/.exec(field)![0]))].toSorted())
  })

  test("no report is left half written", () => {
    expect(existsSync(p().client.outside("/root/r.json"))).toBeTrue()
    expect(readdirSync(p().client.outside("/root")).filter((name) => name.startsWith(".r.json"))).toEqual([])
  })
})
