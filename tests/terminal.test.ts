/** The terminal over there, and how a command ends: with somebody at a real pseudo-terminal, as a user sits at one. */

import { afterAll, beforeAll, describe, expect, setDefaultTimeout, test } from "bun:test"
import { existsSync, readFileSync, writeFileSync } from "node:fs"
import { basename } from "node:path"
import { shellWords, type Host, type HostOptions } from "./lab/lab"
import { EDICT, project, type Project, type ProjectOptions } from "./support"

setDefaultTimeout(120_000)

/** Somebody at a terminal of a machine: types, reads, changes its size. */
class Terminal {
  text = ""
  private seen = 0
  private child: Bun.Subprocess
  private pty: Bun.Terminal

  /** A terminal of the machine's own session, so that job control there is as it is at a console. */
  constructor(machine: { pid: number }, argv: string[], options: { cwd?: string; rows?: number } = {}) {
    const enter = ["nsenter", "--target", String(machine.pid), "--mount", "--uts", "--pid", "--"]
    const inSession = ["/run/lab/usr/bin/setsid", "--ctty", "--wait"]
    const goTo = ["/bin/sh", "-c", `cd "$1" && shift && unset OLDPWD && exec "$@"`, "sh"]
    const decoder = new TextDecoder()
    const data = (_: Bun.Terminal, bytes: Uint8Array) =>
      void (this.text += decoder.decode(bytes, { stream: true }))
    this.pty = new Bun.Terminal({ rows: options.rows ?? 24, cols: 200, data })
    this.child = Bun.spawn([...enter, ...inSession, ...goTo, options.cwd ?? "/root", ...argv], {
      terminal: this.pty,
      env: ENVIRONMENT,
    })
  }

  type(keys: string): void {
    this.pty.write(keys)
  }

  resize(rows: number, columns: number): void {
    this.pty.resize(columns, rows)
  }

  /** Waits for what comes after what was waited for before. */
  async sees(pattern: RegExp, timeout = 30_000): Promise<RegExpExecArray> {
    const end = performance.now() + timeout
    for (;;) {
      const match = pattern.exec(this.plain.slice(this.seen))
      if (match) {
        this.seen += match.index + match[0].length
        return match
      }
      if (performance.now() > end) throw new Error(`no ${pattern} in:\n${JSON.stringify(this.text)}`)
      await Bun.sleep(10)
    }
  }

  /** The text without what moves the cursor and colours it. */
  get plain(): string {
    return this.text.replace(/\x1b\[[0-9;?]*[A-Za-z]/g, "")
  }

  /** Modes of the terminal, whoever changed them. */
  modes(): number[] {
    return [this.pty.inputFlags, this.pty.outputFlags, this.pty.localFlags, this.pty.controlFlags]
  }

  /** Exit code of what runs in it. */
  get ended(): Promise<number> {
    return this.child.exited
  }

  /** The window closes: everybody in it is hung up. */
  close(): void {
    if (!this.pty.closed) this.pty.close()
  }

  [Symbol.dispose](): void {
    this.close()
    this.child.kill("SIGKILL")
  }
}

const ENVIRONMENT = {
  PATH: "/root/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin:/run/lab/bin",
  HOME: "/root",
  USER: "root",
  LOGNAME: "root",
  SHELL: "/bin/bash",
  LANG: "C.UTF-8",
  TERM: "xterm",
  PS1: "HERE> ",
  HISTFILE: "",
}

const CTRL_C = "\x03"
const CTRL_D = "\x04"
const CTRL_Z = "\x1a"

/** An interactive bash with job control in a terminal, where `edict` is a command. */
class Shell extends Terminal {
  constructor(p: Project, options: { rows?: number } = {}) {
    super(p.client, ["bash", "--norc", "--noediting", "-i"], { cwd: p.dir, ...options })
  }

  /** Types a line and says, with done(), what came of it. */
  start(line: string): void {
    this.type(`${line}; echo "code=$?"\n`)
  }

  async done(timeout?: number): Promise<number> {
    return Number((await this.sees(/code=(\d+)\r/, timeout))[1])
  }

  async run(line: string): Promise<number> {
    this.start(line)
    return this.done()
  }
}

/** A project whose user has `edict` on the PATH. */
async function begin(options?: ProjectOptions): Promise<Project> {
  const p = await project(options)
  await p.client.sh(`mkdir bin && ln -s ${EDICT} bin/edict`)
  await p.edict(["h", "nix", "build", "--no-link", ".#hello"]) // nothing has to be built later
  return p
}

/** The project of a block of tests. */
function shared(options?: ProjectOptions): () => Project {
  let started: Project | undefined
  beforeAll(async () => {
    started = await begin(options)
  })
  afterAll(async () => {
    await started?.[Symbol.asyncDispose]()
  })
  return () => started!
}

/** A command line that runs a script of sh over there. */
const over = (text: string, options = "-q"): string =>
  `edict ${options} h nix shell .#hello -c sh -c ${shellWords([text])}`

const argvOver = (text: string): string[] => ["h", "nix", "shell", ".#hello", "-c", "sh", "-c", text]

async function eventually<T>(ask: () => Promise<T> | T, wanted: (answer: T) => boolean, limit: number) {
  const end = performance.now() + limit
  for (;;) {
    const answer = await ask()
    if (wanted(answer) || performance.now() > end) return answer
    await Bun.sleep(100)
  }
}

/** What is left of commands of these tests over there: all of them sleep for 44 seconds and something. */
const leftOver = async (host: Host): Promise<string[]> =>
  (await host.processes()).filter((line) => /sleep 44\d|edict\/run/.test(line))

const nothingIsLeftOver = async (host: Host, limit = 10_000) =>
  expect(
    await eventually(
      () => leftOver(host),
      (list) => list.length === 0,
      limit,
    ),
  ).toEqual([])

/** Nor here, but for the connection that waits for the next run. */
const nothingIsLeftHere = async (p: Project) =>
  expect(
    await eventually(
      async () =>
        (await p.client.processes()).filter(
          (line) => !/ControlMaster=yes|\[mux\]|<defunct>|bash --norc/.test(line),
        ),
      (list) => list.length === 0,
      10_000,
    ),
  ).toEqual([])

/** A command with children of all kinds: it changes a file, says "start" and goes on for minutes. */
const BROOD = `
echo changed >version.txt
sh -c 'trap "" TERM INT HUP; while :; do sleep 441; done' &
setsid sleep 442 &
setsid sh -c 'sleep 443 & sleep 444' &
(sleep 445 &)
setsid sh -c '(setsid sleep 446 &)' &
(env -i sleep 447 &)
(nohup sleep 448 >/dev/null 2>&1 &)
echo start
sleep 449
echo went on`

describe("a terminal over there", () => {
  const p = shared()

  /** Says on the host whether it has a terminal; its own streams may be anything. */
  const which = `if (: </dev/tty) 2>/dev/null; then echo terminal; else echo none; fi >/root/which`
  const cases: [redirected: string, options: string, expected: "terminal" | "none"][] = [
    ["", "-q", "terminal"],
    ["</dev/null", "-q", "none"],
    [">/dev/null", "-q", "none"],
    ["2>/dev/null", "-q", "none"],
    ["</dev/null >/dev/null", "-q", "none"],
    ["</dev/null 2>/dev/null", "-q", "none"],
    [">/dev/null 2>&1", "-q", "none"],
    ["</dev/null >/dev/null 2>&1", "-q", "none"],
    ["| cat", "-q", "none"],
    ["< <(sleep 0.1)", "-q", "none"],
    ["", "-q --no-tty", "none"],
    [">/dev/null", "-q --tty", "terminal"],
    ["</dev/null", "-q --tty", "terminal"],
  ]

  test("if and only if all three streams are one; --tty and --no-tty say otherwise", async () => {
    using shell = new Shell(p())
    const found = []
    for (const [redirected, options] of cases) {
      await shell.run(`${over(which, options)} ${redirected}`)
      found.push([redirected, options, readFileSync(p().host.outside("/root/which"), "utf8").trim()])
    }
    expect(found).toEqual(cases)
  })

  test("has the size of this one from the start, and follows it", async () => {
    using shell = new Shell(p(), { rows: 33 })
    shell.start(over(`trap 'stty size; exit 6' WINCH; stty size; while :; do sleep 0.1; done`))
    await shell.sees(/[\r\n]33 200\r/)
    shell.resize(21, 77)
    await shell.sees(/\n21 77\r/)
    expect(await shell.done()).toBe(6)
  })

  test("has the modes of this one: a key that erases here erases there", async () => {
    using shell = new Shell(p())
    await shell.run("stty erase ^X")
    expect(await shell.run(over("stty -a | grep -o 'erase = ..'"))).toBe(0)
    expect(shell.text).toContain("erase = ^X")
  })

  test("nix develop: a session with job control of its own, and its exit code", async () => {
    using shell = new Shell(p())
    const before = shell.modes()
    shell.start("edict h nix develop")
    await shell.sees(/tree\/root\/p# /)
    shell.type(`echo "$IN_DEV_SHELL-$((40 + 2))"\n`)
    await shell.sees(/yes-42\r/)
    shell.type(`never run this${CTRL_C}`)
    await shell.sees(/tree\/root\/p# .*\^C[^]*tree\/root\/p# /)
    shell.type("sleep 440\n")
    await Bun.sleep(300)
    shell.type(CTRL_Z)
    await shell.sees(/Stopped +sleep 440/)
    shell.type("fg\n")
    await Bun.sleep(300)
    shell.type(CTRL_C)
    shell.type("echo code was $?\n")
    await shell.sees(/code was 130\r/)
    shell.type("exit 7\n")
    expect(await shell.done()).toBe(7)
    expect(shell.modes()).toEqual(before)
  })

  test("nix repl answers, and ends with :q", async () => {
    using shell = new Shell(p())
    shell.start("edict h nix repl")
    await shell.sees(/nix-repl> /)
    shell.type("1+1\n")
    await shell.sees(/\n\r?2\r/)
    shell.type(":q\n")
    expect(await shell.done()).toBe(0)
  })

  test("nix shell starts a shell", async () => {
    using shell = new Shell(p())
    shell.start("edict h nix shell .#hello")
    await shell.sees(/tree\/root\/p# /)
    shell.type('echo "$((20 + 3))-$(hostname)"\n')
    await shell.sees(/23-h\r/)
    shell.type(CTRL_D)
    expect(await shell.done()).toBe(0)
  })

  test("a program asks for a password", async () => {
    using shell = new Shell(p())
    const ask = `read -rsp "Word: " word </dev/tty; echo; echo "\${#word} letters"`
    shell.start(`edict -q h nix shell .#hello -c bash -c ${shellWords([ask])}`)
    await shell.sees(/Word: $/)
    shell.type("sesame\n")
    await shell.sees(/6 letters\r/)
    expect(await shell.done()).toBe(0)
    expect(shell.text).not.toContain("sesame")
  })

  test("Nix's progress bar moves", async () => {
    using shell = new Shell(p())
    await p().sh(`sed -i 's/"slow": [0-9]*/"slow": 2/' settings.json`)
    expect(await shell.run("edict h nix build --no-link .#slow")).toBe(0)
    expect(shell.plain).toMatch(/\r\[1\/0\/1 built\] building slow/)
    await p().sh(`sed -i 's/"slow": [0-9]*/"slow": 1/' settings.json`)
    const { stderr } = await p().edict(["h", "nix", "build", "--no-link", ".#slow"])
    expect(stderr).not.toContain("\x1b[")
  })
})

describe("other terminals", () => {
  test.concurrent("ssh asks for a password once, and Ctrl-C there leaves", async () => {
    const sshdConfig = ["PasswordAuthentication yes", "PubkeyAuthentication no"]
    await using p = await project({ host: { sshdConfig } })
    await p.client.sh(`mkdir bin && ln -s ${EDICT} bin/edict`)
    expect((await p.host.sh("echo root:sesame | chpasswd")).code).toBe(0)
    using shell = new Shell(p)
    const before = shell.modes()
    shell.start("edict h nix eval .#lib.answer")
    await shell.sees(/password: $/)
    shell.type(CTRL_C)
    expect(await shell.done()).toBe(130)
    expect(shell.modes()).toEqual(before)
    shell.start("edict h nix eval .#lib.answer")
    await shell.sees(/password: $/)
    shell.type("sesame\n")
    expect(await shell.done()).toBe(0)
    expect(await shell.run("edict h nix run .#exit7")).toBe(7)
    expect(shell.text.match(/password: /g)).toHaveLength(2)
    expect(shell.text).not.toContain("sesame")
  })

  test.concurrent("transfers have none, whatever ssh_config says", async () => {
    await using p = await begin({ host: { sshdConfig: ["LogLevel VERBOSE"] } })
    const config = p.client.outside("/root/.ssh/config")
    writeFileSync(config, `Host *\n  RequestTTY force\n\n${readFileSync(config, "utf8")}`)
    const terminals = () => p.host.log().match(/Starting session: .* on pts\//g)?.length ?? 0
    const bytes = Buffer.from(Array.from({ length: 200_000 }, (_, n) => (n * 7) % 256))
    writeFileSync(p.file("bytes"), bytes)
    const copy = "nix build --extra-experimental-features 'nix-command flakes' .#big && cp bytes copy"
    using shell = new Shell(p)
    expect(await shell.run(`${over(copy)} </dev/null`)).toBe(0)
    expect([terminals(), readFileSync(p.file("copy")).equals(bytes)]).toEqual([0, true])
    writeFileSync(p.file("bytes"), bytes.reverse())
    expect(await shell.run(over(copy))).toBe(0)
    expect([terminals(), readFileSync(p.file("copy")).equals(bytes)]).toEqual([1, true])
    expect((await p.sh("wc -c <result")).stdout.trim()).toBe("1048576")
  })
})

describe("the modes of the terminal here are as before", () => {
  const p = shared({ host: { delay: 0 } })
  const ends: [name: string, what: (terminal: Terminal, edict: () => Promise<string>) => Promise<void>][] = [
    ["after Ctrl-C", async (terminal) => terminal.type(CTRL_C)],
    ["after SIGTERM", async (_, edict) => void (await p().client.sh(`kill ${await edict()}`))],
    ["after kill -9", async (_, edict) => void (await p().client.sh(`kill -9 ${await edict()}`))],
    ["after a lost connection", async () => p().host.dropConnections()],
  ]

  test.each(ends)("%s", async (_, what) => {
    // A shell without job control: it would restore them itself.
    const script = `edict -q h nix shell .#hello -c sh -c 'echo start; exec sleep 440'; echo "code=$?"; exec sleep 20`
    using terminal = new Terminal(p().client, ["sh", "-c", script], { cwd: p().dir })
    const before = terminal.modes()
    await terminal.sees(/start\r/)
    expect(
      await eventually(
        () => terminal.modes(),
        (modes) => `${modes}` !== `${before}`,
        5000,
      ),
    ).not.toEqual(before)
    await what(terminal, async () => (await p().client.sh("pgrep -o -x edict")).stdout.trim())
    await terminal.sees(/code=(130|143|137|255)\r?\n/)
    expect(
      await eventually(
        () => terminal.modes(),
        (modes) => `${modes}` === `${before}`,
        5000,
      ),
    ).toEqual(before)
    await nothingIsLeftOver(p().host)
  })
})

describe("Ctrl-Z", () => {
  const p = shared()
  const count = () => Number(readFileSync(p().host.outside("/root/count"), "utf8"))
  const counting = `echo start; n=0; while [ ! -e /root/enough ]; do n=$((n + 1)); echo $n >/root/count; sleep 0.05; done; cat >/root/read; echo counted; exit 6`

  /** Whether the command goes on over there. */
  const counts = async (): Promise<boolean> => {
    const before = count()
    return (await eventually(count, (now) => now > before, 700)) > before
  }

  const streams: [name: string, redirected: string][] = [
    ["with a terminal over there", ""],
    ["without", "2>/dev/null"],
  ]
  test.each(streams)("%s: the command stops, and fg lets it go on", async (_, redirected) => {
    await p().host.sh("rm -f enough")
    using shell = new Shell(p())
    shell.start(`${over(counting)} ${redirected}`)
    await shell.sees(/start\r/)
    const during = shell.modes()
    shell.type(CTRL_Z)
    expect(await shell.done()).toBe(148)
    expect(await counts()).toBeFalse()
    // What is typed now is for the shell here, all of it.
    for (const word of ["first", "second", "third"]) {
      shell.type(`echo "${word}=$((40 + 2))"\n`)
      await shell.sees(new RegExp(`${word}=42\r`))
    }
    shell.type("jobs\n")
    await shell.sees(/\[1\]\+ +Stopped +edict/)
    shell.start("fg")
    expect(await eventually(counts, (does) => does, 5000)).toBeTrue()
    expect(
      await eventually(
        () => shell.modes(),
        (modes) => `${modes}` === `${during}`,
        5000,
      ),
    ).toEqual(during)
    shell.type(CTRL_Z)
    expect(await shell.done()).toBe(148)
    expect(await counts()).toBeFalse()
    shell.start("fg")
    expect(await eventually(counts, (does) => does, 5000)).toBeTrue()
    await p().host.sh("touch enough")
    shell.type(`for the command\n${CTRL_D}`)
    await shell.sees(/counted\r/)
    expect(await shell.done()).toBe(6)
    expect(readFileSync(p().host.outside("/root/read"), "utf8")).toBe("for the command\n")
  })

  test("a stopped command goes on in the background with bg, and ends with kill", async () => {
    await p().host.sh("rm -f enough")
    using shell = new Shell(p())
    shell.start(over(counting))
    await shell.sees(/start\r/)
    shell.type(CTRL_Z)
    expect(await shell.done()).toBe(148)
    shell.type("bg\n")
    expect(await eventually(counts, (does) => does, 5000)).toBeTrue()
    shell.type(`echo "mine=$((40 + 2))"\n`)
    await shell.sees(/mine=42\r/)
    shell.start("kill %1; wait %1")
    expect(await shell.done()).toBe(143)
    expect(await counts()).toBeFalse()
  })

  test("one in the background reads nothing that is typed, until it is in the foreground", async () => {
    await p().host.sh("rm -f enough read")
    using shell = new Shell(p())
    shell.type(`${over(counting)} 2>/dev/null &\n`)
    await shell.sees(/start\r/)
    for (const word of ["first", "second", "third"]) {
      shell.type(`echo "${word}=$((40 + 2))"\n`)
      await shell.sees(new RegExp(`${word}=42\r`))
    }
    await p().host.sh("touch enough")
    shell.start("fg")
    await Bun.sleep(500)
    shell.type(`at last\n${CTRL_D}`)
    expect(await shell.done()).toBe(6)
    expect(readFileSync(p().host.outside("/root/read"), "utf8")).toBe("at last\n")
  })

  test("no shell could continue it: then it is not stopped", async () => {
    using terminal = new Terminal(
      p().client,
      ["sh", "-c", `exec ${over("echo start; sleep 1; echo went on")}`],
      {
        cwd: p().dir,
      },
    )
    await terminal.sees(/start\r/)
    terminal.type(CTRL_Z)
    await terminal.sees(/went on\r/)
    expect(await terminal.ended).toBe(0)
  })

  test("kill -9 while it is stopped: nothing is left over there", async () => {
    using shell = new Shell(p())
    shell.start(over("echo start; sleep 440"))
    await shell.sees(/start\r/)
    shell.type(CTRL_Z)
    expect(await shell.done()).toBe(148)
    shell.type("kill -9 %1\n")
    await nothingIsLeftOver(p().host)
  })
})

describe("Ctrl-Z under other shells", () => {
  const shells: [name: string, host: Partial<HostOptions>][] = [
    ["bash as /bin/sh", {}],
    ["busybox", { busybox: true }],
  ]
  test.concurrent.each(shells)("%s", async (_, host) => {
    await using p = await begin({ host })
    if (!host.busybox) expect((await p.host.sh("mount --bind /usr/bin/bash /usr/bin/dash")).code).toBe(0)
    using shell = new Shell(p)
    shell.start(over(`echo start; until stty size | grep "21 77"; do sleep 0.1; done; exit 6`))
    await shell.sees(/start\r/)
    shell.type(CTRL_Z)
    expect(await shell.done()).toBe(148)
    shell.resize(21, 77)
    shell.start("fg")
    await shell.sees(/21 77\r/)
    expect(await shell.done()).toBe(6)
    expect(await shell.run(over("kill -s TERM $$"))).toBe(143)
    shell.start(over("echo start; sleep 440"))
    await shell.sees(/start\r\n/)
    shell.type(CTRL_C)
    expect(await shell.done()).toBe(130)
    await nothingIsLeftOver(p.host)
  })
})

describe("how a command at a terminal ends", () => {
  const p = shared({ host: { delay: 0 } })

  beforeAll(() => void p().host.spawn(["sleep", "3000"], { timeout: 600_000 }))

  /** Something that this user runs over there, too, and that must live. */
  const strayLives = async () =>
    expect((await p().host.processes()).filter((line) => line.endsWith("sleep 3000"))).toHaveLength(1)

  const version = () => readFileSync(p().file("version.txt"), "utf8")

  const ends: [name: string, how: (shell: Shell) => Promise<void>, code: number][] = [
    ["Ctrl-C", async (shell) => shell.type(CTRL_C), 130],
    ["SIGTERM", async () => void (await p().client.sh("pkill -TERM -x edict")), 143],
    ["SIGHUP", async () => void (await p().client.sh("pkill -HUP -x edict")), 129],
  ]
  test.each(ends)("%s: its children end, its changes come home", async (_, how, code) => {
    await p().sh("git checkout -q .")
    using shell = new Shell(p())
    await p().host.sh("cat >brood", { stdin: BROOD.replace(/^.*(441|447).*$/gm, "") })
    shell.start(over("sh /root/brood"))
    await shell.sees(/start\r/)
    await how(shell)
    expect(await shell.done()).toBe(code)
    expect(version()).toBe("changed\n")
    await nothingIsLeftOver(p().host)
    await strayLives()
  })

  test("the window closes: nothing is left over there nor here", async () => {
    await p().host.sh("cat >brood", { stdin: BROOD })
    const shell = new Shell(p())
    shell.start(over("sh /root/brood"))
    await shell.sees(/start\r/)
    shell.close()
    await nothingIsLeftOver(p().host)
    await nothingIsLeftHere(p())
    shell[Symbol.dispose]()
    await strayLives()
  })

  test("kill -9: nothing is left of a session with jobs of its own", async () => {
    using shell = new Shell(p())
    shell.start("edict h nix develop")
    await shell.sees(/tree\/root\/p# /)
    shell.type("sleep 441 & (sleep 442 &) ; setsid sleep 443 &\n")
    await shell.sees(/tree\/root\/p# /)
    shell.type(`sleep 444\n`)
    await Bun.sleep(500)
    await p().client.sh("pkill -KILL -x edict")
    expect(await shell.done()).toBe(137)
    await nothingIsLeftOver(p().host)
    await nothingIsLeftHere(p())
    await strayLives()
  })

  test("a reader that leaves early ends the command as it would here", async () => {
    using shell = new Shell(p())
    // 128 + 13 is what a shell says of a program that SIGPIPE ended, here as over there.
    shell.type(`${over("yes")} | head -n 1; echo "ends=\${PIPESTATUS[*]}"\n`)
    expect((await shell.sees(/ends=([\d ]+)\r/))[1]).toBe("141 0")
    shell.type(`yes | head -n 1; echo "ends=\${PIPESTATUS[*]}"\n`)
    expect((await shell.sees(/ends=([\d ]+)\r/))[1]).toBe("141 0")
    shell.type(`${over("yes; exec sleep 440")} </dev/null | head -n 1; echo "ends=\${PIPESTATUS[*]}"\n`)
    await shell.sees(/\ny\r/)
    await Bun.sleep(300)
    shell.type(CTRL_C)
    expect((await shell.sees(/ends=([\d ]+)\r/))[1]).toBe("130 0")
    await nothingIsLeftOver(p().host)
    await strayLives()
  })
})

describe("networks", () => {
  test.concurrent("a host that does not answer: the second Ctrl-C leaves at once", async () => {
    await using p = await begin({ host: { delay: 0 } })
    using shell = new Shell(p)
    await p.host.freeze()
    shell.start(over("sleep 440"))
    await Bun.sleep(500)
    shell.type(CTRL_C)
    await Bun.sleep(300)
    shell.type(CTRL_C)
    const code = await shell.done(5_000).finally(() => p.host.freeze())
    expect(code).toBe(130)
    await nothingIsLeftOver(p.host, 35_000) // who waits there for an agent waits for 20 seconds
    await nothingIsLeftHere(p)
  })

  test.concurrent("one that falls silent: within 10 seconds nothing is left over there", async () => {
    await using p = await begin({ host: { delay: 0 } })
    await p.host.sh("cat >brood", { stdin: BROOD })
    void p.host.spawn(["sleep", "3000"], { timeout: 600_000 })
    const running = p.spawn(argvOver("exec sh /root/brood"))
    await running.waitFor("start")
    await p.host.freeze()
    await nothingIsLeftOver(p.host, 10_000)
    expect((await p.host.processes()).filter((line) => line.endsWith("sleep 3000"))).toHaveLength(1)
    // It comes back: one line says what was, and what the command had done is here.
    await p.host.freeze()
    const result = await running.result
    expect([result.code, result.stdout]).toEqual([255, "start\n"])
    expect(result.stderr).toMatch(/^edict: h heard nothing from here for 6 seconds, and ended the command/m)
    expect(readFileSync(p.file("version.txt"), "utf8")).toBe("changed\n")
  })

  test.concurrent("one that has much else to carry harms nothing", async () => {
    await using p = await begin({ host: { delay: 0 } })
    const words = [EDICT, ...argvOver("echo start; head -n 24 | tail -n 1; echo went on; exit 6")]
    const running = p.client.spawn(["sh", "-c", `${shellWords(words)}; exit $?`], { cwd: p.dir })
    await running.waitFor("start")
    // Who says that this side is there stands still; what the command reads arrives, by ssh's shared connection.
    const edict = async (signal: string) => p.client.sh(`pkill -${signal} -x ${basename(EDICT)}`)
    expect((await edict("STOP")).code).toBe(0)
    for (let line = 1; line <= 24; line++) {
      running.write(`line ${line}\n`)
      await Bun.sleep(500)
    }
    await edict("CONT")
    running.end()
    expect(await running.result).toMatchObject({ code: 6, stdout: "start\nline 24\nwent on\n" })
  })

  test.concurrent("one that stands still for some seconds harms nothing", async () => {
    await using p = await begin({ host: { delay: 0 } })
    const running = p.spawn(argvOver("echo start; sleep 6; echo changed >version.txt; echo went on; exit 6"))
    await running.waitFor("start")
    await p.host.freeze()
    await Bun.sleep(4000)
    await p.host.freeze()
    expect(await running.result).toMatchObject({ code: 6, stdout: "start\nwent on\n" })
    expect(readFileSync(p.file("version.txt"), "utf8")).toBe("changed\n")
  })
})

describe("a second Ctrl-C leaves at once", () => {
  /** Programs over there that say when they begin with something, and then take their time. */
  const slow = (program: string, when: string) =>
    `#!/bin/sh\ncase "$*" in ${when}) touch /root/begun; sleep 7 ;; esac\nexec /run/lab/usr/bin/${program} "$@"\n`

  const stages: [stage: string, program: string, when: string, ran: boolean][] = [
    ["upload", "rsync", "*--server*", false],
    ["results", "nix-store", "--export*", true],
    ["sync back", "tar", "*-cf*", true],
  ]
  test.concurrent.each(stages)("during %s", async (stage, program, when, ran) => {
    await using p = await begin({ host: { hide: [program] } })
    await p.host.sh(`cat >/usr/bin/${program} && chmod +x /usr/bin/${program}`, {
      stdin: slow(program, when),
    })
    await p.sh("head -c 300000 /dev/urandom >more")
    const build = "nix build --extra-experimental-features 'nix-command flakes' .#multi"
    const text = `touch /root/ran; ${stage === "results" ? build : ":"}; echo changed >version.txt`
    using shell = new Shell(p)
    shell.start(over(text))
    expect(await eventually(() => existsSync(p.host.outside("/root/begun")), Boolean, 30_000)).toBeTrue()
    shell.type(CTRL_C)
    await Bun.sleep(300)
    shell.type(CTRL_C)
    expect(await shell.done(10_000)).toBe(130)
    expect(existsSync(p.host.outside("/root/ran"))).toBe(ran)
    // Without results the changes came home all the same.
    const version = stage === "results" ? "changed\n" : "1\n"
    expect(readFileSync(p.file("version.txt"), "utf8")).toBe(version)
    expect((await p.sh("git status --porcelain")).stdout).toBe(
      version === "1\n" ? "?? more\n" : " M version.txt\n?? more\n",
    )
    await nothingIsLeftOver(p.host)
    await nothingIsLeftHere(p)
    await p.host.sh(`ln -sf /run/lab/usr/bin/${program} /usr/bin/${program}`)
    expect(await shell.run(over(text))).toBe(0)
    expect(readFileSync(p.file("version.txt"), "utf8")).toBe("changed\n")
  })

  test.concurrent("after the command, the first one waits until its changes are home", async () => {
    await using p = await begin({ host: { hide: ["tar"] } })
    const late = slow("tar", "*-cf*").replace("sleep 7", "sleep 2")
    await p.host.sh("cat >/usr/bin/tar && chmod +x /usr/bin/tar", { stdin: late })
    using shell = new Shell(p)
    shell.start(over("echo changed >version.txt"))
    expect(await eventually(() => existsSync(p.host.outside("/root/begun")), Boolean, 30_000)).toBeTrue()
    shell.type(CTRL_C)
    expect(await shell.done(10_000)).toBe(130)
    expect(readFileSync(p.file("version.txt"), "utf8")).toBe("changed\n")
    await nothingIsLeftHere(p)
  })

  test.concurrent("no file here is half, whenever it comes", async () => {
    await using p = await begin()
    const [before, after] = ["old\n".repeat(20_000), "new!\n".repeat(30_000)]
    const names = Array.from({ length: 60 }, (_, n) => `files/${n}.txt`)
    await p.sh("mkdir files")
    for (const name of names) writeFileSync(p.file(name), before)
    await p.sh("git add . && git commit -qm files")
    for (const wait of [0, 3, 6, 12]) {
      const change = `for f in files/*; do yes new! | head -n 30000 >"$f.new"; mv "$f.new" "$f"; done; echo start`
      const running = p.spawn(argvOver(change))
      const changed = () => names.filter((name) => readFileSync(p.file(name), "utf8") !== before).length
      await running.waitFor("start")
      while (changed() === 0 && existsSync(`/proc/${await running.pid().catch(() => 0)}`)) await Bun.sleep(1)
      await Bun.sleep(wait)
      await running.kill("SIGINT").catch(() => undefined)
      await running.kill("SIGINT").catch(() => undefined)
      await running.result
      for (const name of names) expect([before, after]).toContain(readFileSync(p.file(name), "utf8"))
      expect((await p.sh("git status --porcelain | grep -v '^ M files/'")).stdout).toBe("")
      expect((await p.edict(argvOver("true"))).code).toBe(0)
      for (const name of names) expect(readFileSync(p.file(name), "utf8") === after).toBeTrue()
      await p.sh("git checkout -q .")
    }
  })
})
