/** Many hosts: the machines file, picking one, running on several at once, and what is said of them. */

import { afterAll, beforeAll, describe, expect, setDefaultTimeout, test } from "bun:test"
import { existsSync, mkdirSync, readFileSync, readlinkSync, writeFileSync } from "node:fs"
import { join } from "node:path"
import {
  chooseHosts,
  EdictError,
  hostLabel,
  hostTable,
  parseArguments,
  parseConfig,
  parseMachines,
  rankHosts,
  suffixLink,
  type Host as HostOf,
  type HostRun,
  type Probe,
} from "../edict"
import { GIT_INIT, SYSTEM, writeFlake } from "./lab/flake"
import {
  startClient,
  startHost,
  type Client,
  type Host,
  type HostOptions,
  type Result,
  type RunOptions,
} from "./lab/lab"
import { EDICT } from "./support"

setDefaultTimeout(120_000)

// ── Tables ───

/** A host as a config has it. */
async function host(name: string, toml = ""): Promise<HostOf> {
  const config = await parseConfig(`[hosts.${name}]\n${toml}`, "/c.toml")
  return chooseHosts(config, await parseArguments([name, "nix"], {}), { HOME: "/home/ed" })[0]!
}

function thrown(work: () => unknown): EdictError {
  try {
    work()
  } catch (error) {
    if (error instanceof EdictError) return error
    throw error
  }
  throw new Error("no error")
}

describe("the machines file of Nix", () => {
  const KEY = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIBkmFO0+/vY comment"
  const files: Record<string, string> = {
    "/etc/nix/more": "inner@more i686-linux\n@deeper",
    "/etc/nix/deeper": "# nothing\nssh://deep",
    "/etc/nix/loop": "@/etc/nix/loop\nlooped",
  }
  const parse = (text: string) =>
    parseMachines(text, { file: "/etc/nix/machines", include: (file) => files[file] })

  test("every field", () => {
    const base64 = Buffer.from(KEY).toString("base64")
    expect(
      parse(`ssh-ng://root@big:2222 x86_64-linux,i686-linux /root/key 8 2.5 kvm,big-parallel kvm ${base64}`),
    ).toEqual({
      "root@big:2222": {
        address: "ssh-ng://root@big:2222",
        systems: ["x86_64-linux", "i686-linux"],
        features: ["kvm", "big-parallel"],
        mandatoryFeatures: ["kvm"],
        speed: 2.5,
        tags: [],
        sshOptions: ["-i", "/root/key"],
        hostKey: KEY,
        directory: undefined,
        forwardAgent: false,
        env: {},
        requireSignatures: false,
        import: undefined,
        compress: "auto",
        substitute: false,
        sendInputs: false,
      },
    })
  })

  const tables: [text: string, names: string[]][] = [
    ["", []],
    ["a;b\n c \n;;", ["a", "b", "c"]],
    ["# a\na # b;c\n", ["a", "c"]],
    ["a -", ["a"]],
    ["ssh://root@h?remote-store=x i686-linux", ["root@h"]],
    ["ssh-ng://root@h/", ["root@h"]],
    ["local\ndaemon\nauto\n/nix/store2\nhttps://cache\nunix:///x\ns3://b\nlocal?root=/x", []],
    ["localhost\nautomat", ["localhost", "automat"]],
    ["@/etc/nix/more\nz", ["inner@more", "deep", "z"]],
    ["@more", ["inner@more", "deep"]],
    ["@/missing\na", ["a"]],
    ["@/etc/nix/loop", ["looped"]],
  ]
  test.each(tables)("%j names %j", (text, names) => expect(Object.keys(parse(text))).toEqual(names))

  test("dashes and missing fields are defaults; a speed of 0 is 1", () => {
    const empty = { systems: [], features: [], mandatoryFeatures: [], speed: 1, sshOptions: [] }
    for (const line of ["h", "h -", "h - - - - - - -", "h - - 4 0"]) {
      expect(parse(line).h).toMatchObject(empty)
      expect(parse(line).h!.hostKey).toBeUndefined()
    }
  })

  test("a mandatory feature is one that the host has", async () => {
    const { h } = parse("h i686-linux - 1 1 kvm special")
    expect(h).toMatchObject({ features: ["kvm"], mandatoryFeatures: ["special"] })
  })

  test("two lines for one host add up", () => {
    expect(parse("h i686-linux - 1 1 kvm kvm\nssh://h x86_64-linux - 1 3 big").h).toMatchObject({
      systems: ["i686-linux", "x86_64-linux"],
      features: ["kvm", "big"],
      mandatoryFeatures: [],
      speed: 3,
    })
    expect(parse("h i686-linux\nh -").h!.systems).toEqual([])
  })

  const wrong: [line: string, message: string][] = [
    ["h x k many", "/etc/nix/machines: h: the fourth field (jobs) must be a whole number, not many"],
    ["h x k 1 fast", "/etc/nix/machines: h: the fifth field (speed) must be a number, not fast"],
    ["h x k 1 -2", "/etc/nix/machines: h: the fifth field (speed) must be a number, not -2"],
    ["h x k 1 1 - - bm8=", "/etc/nix/machines: h: the eighth field (host key) must be a line of known_hosts"],
    ["-oProxyCommand=x", "/etc/nix/machines: -oProxyCommand=x: the URI must be ssh://[user@]host[:port]"],
    ["ssh://$(id)", "/etc/nix/machines: ssh://$(id): the URI must be ssh://[user@]host[:port]"],
  ]
  test.each(wrong)("%j is an error", (line, message) => {
    expect(thrown(() => parse(`good\n${line}`)).message).toStartWith(message)
  })

  test("a key cannot bring a second line along", () => {
    const two = Buffer.from(`${KEY}\nevil ssh-rsa AAAA`).toString("base64")
    expect(thrown(() => parse(`h - - - - - - ${two}`)).message).toContain("host key")
  })
})

describe("which host fits best", () => {
  type Facts = Record<string, string>
  const live: Facts = {
    nix: "nix (Nix) 2.8.0",
    end: "yes",
    "set.system": "x86_64-linux",
    cpus: "4",
    load: "0.1",
  }
  const probe = async (name: string, facts: Facts = {}, toml = "", error?: string): Promise<Probe> => ({
    host: await host(name, toml),
    facts: new Map(Object.entries(error === undefined ? { ...live, ...facts } : {})),
    multiplexed: true,
    latency: 1,
    skew: 0,
    ...(error === undefined ? {} : { error }),
  })
  const names = (probes: Probe[], need: Partial<Parameters<typeof rankHosts>[1]> = {}) =>
    rankHosts(probes, { system: "x86_64-linux", features: [], last: undefined, ...need }).map(
      ({ host: { name }, why }) => (why === undefined ? name : `${name} ${why}`),
    )

  test("the least loaded by speed", async () => {
    const probes = [
      await probe("busy", { load: "8" }),
      await probe("fast", { load: "8" }, "speed = 4"),
      await probe("many", { load: "8", cpus: "64" }),
    ]
    expect(names(probes)).toEqual(["many", "fast", "busy"])
  })

  test("of idle ones the last used, then the fastest, then the first of the list", async () => {
    const probes = [await probe("a"), await probe("b"), await probe("c", { load: "0.9" }, "speed = 2")]
    expect(names(probes)).toEqual(["c", "a", "b"])
    expect(names(probes, { last: "b" })).toEqual(["b", "c", "a"])
    expect(names(probes, { last: "elsewhere" })).toEqual(["c", "a", "b"])
  })

  test("a warm store is not worth a busy host", async () => {
    expect(names([await probe("a", { load: "16" }), await probe("b")], { last: "a" })).toEqual(["b", "a"])
  })

  test("the system: that of the config, else what Nix there says", async () => {
    const probes = [
      await probe("said", { "set.extra-platforms": "i686-linux aarch64-linux" }),
      await probe("arm", { "set.system": "aarch64-linux" }),
      await probe("told", {}, 'systems = ["aarch64-linux"]'),
      await probe("not", { "set.system": "aarch64-linux" }, 'systems = ["x86_64-linux"]'),
    ]
    expect(names(probes, { system: "aarch64-linux" })).toEqual([
      "said",
      "arm",
      "told",
      "not is for x86_64-linux",
    ])
  })

  test("who cannot be picked, and why", async () => {
    const probes = [
      await probe("dead", {}, "", "cannot reach dead"),
      await probe("bare", { nix: "" }),
      await probe("arm", { "set.system": "aarch64-linux" }),
      await probe("good", { load: "99" }),
    ]
    expect(names(probes)).toEqual([
      "good",
      "dead does not answer",
      "bare has no Nix",
      "arm is for aarch64-linux",
    ])
  })

  test("features: needed ones must be there, mandatory ones must be needed", async () => {
    const plain = await probe("plain", { "set.system-features": "big-parallel kvm" })
    const told = await probe("told", { "set.system-features": "kvm" }, 'features = ["gpu"]')
    const base = await probe("picky")
    const picky: Probe = { ...base, host: { ...base.host, mandatoryFeatures: ["gpu"] } }
    const all = [plain, told, picky]
    expect(names(all)).toEqual(["plain", "told", "picky takes only what needs gpu"])
    expect(names(all, { features: ["gpu"] })).toEqual(["told", "picky", "plain lacks gpu"])
    expect(names(all, { features: ["kvm"] })).toEqual(["plain", "told lacks kvm", "picky lacks kvm"])
  })
})

describe("names of result links with several hosts", () => {
  test.each([
    ["result", "result", "result-a"],
    ["result-dev", "result", "result-a-dev"],
    ["result-1-dev", "result", "result-a-1-dev"],
    ["x", "x", "x-a"],
    ["x-man", "x", "x-a-man"],
    ["results", "result", "results-a"],
    ["other", "result", "other-a"],
  ])("%s of -o %s: %s", async (name, linkPrefix, expected) => {
    const { options } = await parseArguments(["--link-suffix", "-a", "h", "nix"], {})
    expect(suffixLink(name, { linkPrefix, options })).toBe(expected)
  })

  test("one host alone keeps them", async () => {
    const { options } = await parseArguments(["h", "nix"], {})
    expect(suffixLink("result-dev", { linkPrefix: "result", options })).toBe("result-dev")
  })
})

describe("the table at the end and the labels", () => {
  test("host, exit code, time and results, in columns", async () => {
    const run = async (name: string, more: Partial<HostRun>): Promise<HostRun> => ({
      host: await host(name),
      state: "ended",
      code: 0,
      seconds: 0,
      report: {},
      ...more,
    })
    const link = join(process.cwd(), "result-long-name")
    expect(
      hostTable([
        await run("long-name", {
          seconds: 1.25,
          report: { resultLinks: [{ link, target: "/nix/store/x" }] },
        }),
        await run("b", { code: 255, seconds: 71 }),
        await run("c", { state: "stopped", code: 143, seconds: 3 }),
        await run("d", { state: "not run" }),
      ]),
    ).toBe(
      [
        "edict: host       exit     time    results",
        "edict: long-name  0        1.3 s   result-long-name",
        "edict: b          255      71.0 s",
        "edict: c          stopped  3.0 s",
        "edict: d          -        not run",
        "",
      ].join("\n"),
    )
  })

  test("plain and padded where no terminal is; on one in a colour that stays the same", () => {
    const hosts = "a bb ccc dddd e f g h i j".split(" ").map((name) => ({ name }))
    expect(hostLabel({ name: "bb" }, hosts, "plain")).toBe("bb   │ ")
    const labels = hosts.map((one) => hostLabel(one, hosts, "coloured"))
    for (const label of labels) expect(label).toMatch(/^\x1b\[\d\dm\w+ *│\x1b\[0m $/)
    expect(new Set(labels.map((label) => label.slice(0, 5))).size).toBe(10)
    expect(hosts.toReversed().map((one) => hostLabel(one, hosts.toReversed(), "coloured"))).toEqual(
      labels.toReversed(),
    )
    expect(hostLabel({ name: "a" }, [{ name: "a" }], "coloured").slice(0, 5)).toBe(
      hostLabel({ name: "a" }, [{ name: "a" }, { name: "zz" }], "coloured").slice(0, 5),
    )
  })
})

describe("who is meant", () => {
  const TOML = `
[hosts.a]
address = "ssh://root@one:22"
tags = ["ci", "arm"]
[hosts.b]
tags = ["ci"]
[hosts.twin]
address = "ssh://root@one:22"
`
  const meant = async (word: string) =>
    chooseHosts(await parseConfig(TOML, "/c.toml"), await parseArguments([word, "nix"], {}), {}).map(
      ({ name }) => name,
    )

  test.each([
    ["a", ["a"]],
    ["a,b", ["a", "b"]],
    ["b,a,b", ["b", "a"]],
    ["@ci", ["a", "b"]],
    ["@all", ["a", "b"]],
    ["a,@arm,c", ["a", "c"]],
    ["a,twin", ["a"]],
    ["twin,a", ["twin"]],
  ])("%s: %j", async (word, names) => expect(await meant(word)).toEqual(names))

  test.each([
    ["@cj", "no host in /c.toml has the tag cj; there are ci, arm", "edict @ci …"],
    ["@xyzzy", "no host in /c.toml has the tag xyzzy", 'tags = ["xyzzy"]'],
    ["a,", "host  is empty", ""],
    ["a,-x", "host -x starts with -", ""],
  ])("%s: %s", async (word, message, hint) => {
    const config = await parseConfig(TOML, "/c.toml")
    const invocation = await parseArguments([word, "nix"], {})
    const error = thrown(() => chooseHosts(config, invocation, {}))
    expect(error.message).toStartWith(message)
    expect(error.hint).toContain(hint)
  })

  test.each(["@x", "-x", "a,b", "nix", "nix-build"])("no host can be called %s", async (name) => {
    const error: unknown = await parseConfig(`[hosts."${name}"]`, "/c.toml").catch((e: unknown) => e)
    expect(String((error as Error).message)).toStartWith(`/c.toml: hosts.${name} cannot be given as HOST`)
  })

  test.each(["-oProxyCommand=x", "a b", "http://x", "ssh://h/path"])("%s is no address", async (address) => {
    const error: unknown = await parseConfig(`[hosts.a]\naddress = "${address}"`, "/c.toml").catch(
      (e: unknown) => e,
    )
    expect(String((error as Error).message)).toStartWith(
      `/c.toml: hosts.a.address must be [user@]host or ssh://[user@]host[:port]`,
    )
  })
})

// ── Machines of the lab ───

/** Several hosts, a client with a flake in /root/p, and a host config. */
class Lab {
  private constructor(
    readonly hosts: Host[],
    readonly client: Client,
  ) {}

  static async start(hosts: HostOptions[], more: { config?: string; systems?: string[] } = {}): Promise<Lab> {
    const started = await Promise.all(hosts.map(startHost))
    const client = await startClient({ hosts: started })
    const lab = new Lab(started, client)
    writeFlake(client.outside("/root/p"), { systems: more.systems ?? [SYSTEM] })
    await lab.sh(GIT_INIT)
    lab.configure(more.config ?? started.map(({ name }) => `[hosts.${name}]`).join("\n"))
    return lab
  }

  configure(toml: string): void {
    mkdirSync(this.client.outside("/root/.config/edict"), { recursive: true })
    writeFileSync(this.client.outside("/root/.config/edict/config.toml"), toml)
  }

  edict(words: string, more: RunOptions = {}): Promise<Result> {
    return this.sh(`edict ${words}`, more)
  }

  sh(script: string, more: RunOptions = {}): Promise<Result> {
    return this.client.sh(`edict() { '${EDICT}' "$@"; }\n${script}`, { cwd: "/root/p", ...more })
  }

  file(name: string): string {
    return this.client.outside(join("/root/p", name))
  }

  /** Removes what the commands of earlier tests made here. */
  async tidy(): Promise<void> {
    const { code } = await this.sh(
      "git reset -q --hard $(git rev-list --max-parents=0 HEAD) && git clean -qfdx && rm -rf .git/edict",
    )
    expect(code).toBe(0)
  }

  async stop(): Promise<void> {
    await Promise.all([this.client.stop(), ...this.hosts.map((one) => one.stop())])
  }
}

function shared(start: () => Promise<Lab>): () => Lab {
  let lab: Lab | undefined
  beforeAll(async () => {
    lab = await start()
  })
  afterAll(async () => {
    await lab?.stop()
  })
  return () => lab!
}

/** A command that runs a script of sh over there. */
const there = (script: string): string => `nix shell .#hello -c sh -c '${script}'`

const accepted = (one: Host): number => one.log().match(/^Accepted /gm)?.length ?? 0
const sleepers = async (one: Host): Promise<string[]> =>
  (await one.processes()).filter((line) => /\bsleep \d{3}/.test(line))

async function eventually<T>(
  ask: () => Promise<T>,
  wanted: (answer: T) => boolean,
  limit = 15_000,
): Promise<T> {
  const end = performance.now() + limit
  for (;;) {
    const answer = await ask()
    if (wanted(answer) || performance.now() > end) return answer
    await Bun.sleep(100)
  }
}

const DEAD = '[hosts.dead]\naddress = "ssh://root@127.0.0.1:1"\n'

describe("three hosts at once", () => {
  const lab = shared(() =>
    Lab.start([{ name: "a" }, { name: "b", shell: "fish" }, { name: "slow", delay: 30 }], {
      config: `[hosts.a]\ntags = ["ci"]\n[hosts.b]\ntags = ["ci"]\nenv = { WHO = "b" }\n[hosts.slow]\n${DEAD}`,
    }),
  )

  test("build everywhere; links are named after the hosts, output is labelled, a table ends it", async () => {
    const result = await lab().edict("a,b,slow nix build .#hello -L")
    expect(result.code).toBe(0)
    expect(result.stdout).toBe("")
    const links = ["result-a", "result-b", "result-slow"].map((name) => readlinkSync(lab().file(name)))
    expect(links[0]).toMatch(/^\/nix\/store\/[^/]+-hello$/)
    expect(new Set(links).size).toBe(1)
    expect(existsSync(lab().file("result"))).toBe(false)
    const roots = await lab().sh(`nix-store --check-validity ${links[0]} && nix-store -q --roots ${links[0]}`)
    for (const name of ["a", "b", "slow"]) expect(roots.stdout).toContain(`/root/p/result-${name} -> `)
    const lines = result.stderr.trimEnd().split("\n")
    const table = lines.slice(-4)
    expect(table[0]).toBe("edict: host  exit  time   results")
    for (const [at, name] of ["a", "b", "slow"].entries())
      expect(table[at + 1]).toMatch(new RegExp(`^edict: ${name} +0 +[0-9.]+ s +result-${name}$`))
    for (const line of lines.slice(0, -4)) expect(line).toMatch(/^(a   |b   |slow) │ /)
  })

  test("-o, several installables and outputs", async () => {
    const result = await lab().edict(
      "a,b nix build -o x .#multi .#multi^dev .#hello".replace(" .#multi^dev", ""),
    )
    expect(result.code).toBe(0)
    const made = (await lab().sh("ls -d x*")).stdout.trim().split("\n").sort()
    const alone = await lab().sh("edict a nix build -o y .#multi .#hello && ls -d y*")
    const names = alone.stdout
      .trim()
      .split("\n")
      .map((name) => name.slice(1))
    expect(names.length).toBeGreaterThan(1)
    expect(made).toEqual(["a", "b"].flatMap((name) => names.map((rest) => `x-${name}${rest}`)).sort())
    await lab().tidy()
  })

  test("a dead host fails alone; the exit code is the highest", async () => {
    const result = await lab().edict(`@all ${there('echo "$WHO" here; exit 3')}`)
    expect(result.code).toBe(255)
    expect(result.stdout.split("\n").sort()).toEqual(["", "a    │  here", "b    │ b here", "slow │  here"])
    expect(result.stderr).toMatch(/^dead │ edict: cannot reach dead: .*Connection refused/m)
    expect(result.stderr).toMatch(/^edict: a +3 [^]*^edict: b +3 [^]*^edict: slow +3 [^]*^edict: dead +255 /m)
    expect((await lab().edict(`a,b,slow ${there('[ "$WHO" = b ] && exit 9; exit 4')}`)).code).toBe(9)
  })

  test("@TAG, the default, $EDICT_HOST: each can mean several; `--` may stand before the host", async () => {
    const hosts = async (words: string, env: Record<string, string> = {}) =>
      (await lab().edict(words, { env })).stdout.split("\n").sort().slice(1)
    const both = ["a │ hi", "b │ hi"]
    const say = there("echo hi")
    expect(await hosts(`@ci ${say}`)).toEqual(both)
    expect(await hosts(`-- @ci ${say}`)).toEqual(both)
    expect(await hosts(`--jobs 1 -o LogLevel=ERROR ${say}`, { EDICT_HOST: "a,b" })).toEqual(both)
    writeFileSync(
      lab().client.outside("/root/other.toml"),
      'default = "@x"\n[hosts.a]\ntags = ["x"]\n[hosts.b]\ntags = ["x"]\n',
    )
    expect(await hosts(say, { EDICT_CONFIG: "/root/other.toml" })).toEqual(both)
    expect(await hosts(`--config=/root/other.toml ${say}`)).toEqual(both)
    expect(await hosts(".#both", { EDICT_HOST: "a,b" })).toEqual([])
    expect((await lab().edict("a,b .#both")).stdout.split("\n").sort().slice(1)).toEqual([
      "a │ to stdout",
      "b │ to stdout",
    ])
  })

  test("one host, or one by several names, is run on once and without a label", async () => {
    const before = accepted(lab().hosts[0]!)
    for (const word of ["a", "a,a", "a,root@a", "root@a,a,root@a"]) {
      const result = await lab().edict(`${word} ${there("echo hi")}`)
      expect([word, result.stdout, result.stderr]).toEqual([word, "hi\n", ""])
    }
    const two = await lab().edict(`a,root@a,b,root@b ${there("echo hi")}`)
    expect(two.stdout.split("\n").sort()).toEqual(["", "a │ hi", "b │ hi"])
    expect(accepted(lab().hosts[0]!) - before).toBeLessThanOrEqual(2)
  })

  test("stdout and stderr stay apart, and whole lines are written", async () => {
    const script =
      'head -c 100000 /dev/zero | tr "\\\\0" x; echo; head -c 100000 /dev/zero | tr "\\\\0" y >&2; echo >&2; printf "\\\\377\\\\000\\\\r z"'
    const body = `i=0; while [ $i -lt 8 ]; do i=$((i+1)); ${script}; echo; done; printf end`
    const result = await lab().edict(
      `a,b,slow ${there(body)} 2>/tmp/err | tee /tmp/out | wc -c; cat /tmp/err`,
    )
    const out = readFileSync(lab().client.outside("/tmp/out"))
    const lines = out.toString("latin1").split("\n").slice(0, -1)
    const label = /^(a   |b   |slow) \xe2\x94\x82 /
    for (const line of lines) expect(line).toMatch(label)
    for (const name of ["a   ", "b   ", "slow"]) {
      const own = lines.filter((line) => line.startsWith(name)).map((line) => line.replace(label, ""))
      expect(own).toEqual([
        ...Array.from({ length: 8 }, () => ["x".repeat(100_000), "\xff\0\r z"]).flat(),
        "end",
      ])
    }
    const errors = result.stdout.split("\n").filter((line) => line.includes("yyy"))
    expect(errors).toHaveLength(24)
    for (const line of errors) expect(line).toMatch(/^(a   |b   |slow) │ y{100000}$/)
  })

  test("not even the two streams of one pipe mix within a line, with a slow reader", async () => {
    const body =
      'i=0; while [ $i -lt 20 ]; do i=$((i+1)); head -c 90000 /dev/zero | tr "\\\\0" x; echo; head -c 90000 /dev/zero | tr "\\\\0" y >&2; echo >&2; done'
    const result = await lab().sh(`edict a,b ${there(body)} 2>&1 | { sleep 1; cat; } >/tmp/both`)
    expect(result.code).toBe(0)
    const lines = readFileSync(lab().client.outside("/tmp/both"), "utf8").split("\n")
    const long = lines.filter((line) => /x{10}|y{10}/.test(line))
    expect(long).toHaveLength(80)
    for (const line of long) expect(line).toMatch(/^[ab] │ (x{90000}|y{90000})$/)
  })

  test("who reads only the head ends the rest", async () => {
    const began = performance.now()
    const result = await lab().sh(`edict a,b ${there("while :; do echo line; sleep 0.05; done")} | head -n 3`)
    expect(result.stdout.split("\n")).toHaveLength(4)
    expect(performance.now() - began).toBeLessThan(30_000)
    expect(result.stderr).not.toContain("bug")
  })

  test("on a terminal labels are coloured; elsewhere they are not", async () => {
    const run = lab().client.spawn([EDICT, "a,b", "nix", "shell", ".#hello", "-c", "echo", "hi"], {
      cwd: "/root/p",
      tty: true,
    })
    const { stdout } = await run.result
    const colours = [...stdout.matchAll(/\x1b\[(\d\d)m([ab]) │\x1b\[0m hi/g)].map(
      ([, colour, name]) => `${name}${colour}`,
    )
    expect(colours.map((word) => word[0]).sort()).toEqual(["a", "b"])
    const mixed = lab().client.spawn(
      ["sh", "-c", `cd /root/p && '${EDICT}' b,a nix run .#both >/root/plain`],
      { tty: true },
    )
    const { stdout: screen } = await mixed.result
    expect(readFileSync(lab().client.outside("/root/plain"), "utf8").split("\n").sort()).toEqual([
      "",
      "a │ to stdout",
      "b │ to stdout",
    ])
    for (const colour of colours)
      expect(screen).toContain(`\x1b[${colour.slice(1)}m${colour[0]} │\x1b[0m to stderr`)
    const dull = lab().client.spawn([EDICT, "a,b", "nix", "shell", ".#hello", "-c", "echo", "hi"], {
      cwd: "/root/p",
      tty: true,
      env: { NO_COLOR: "1" },
    })
    expect((await dull.result).stdout).toContain("a │ hi")
  })

  test("stdin is not handed to several hosts", async () => {
    const result = await lab().edict("a,b nix run .#cat", { stdin: "secret\n" })
    expect([result.code, result.stdout]).toEqual([0, ""])
    expect((await lab().edict("a nix run .#cat", { stdin: "given\n" })).stdout).toBe("given\n")
  })

  test("--jobs limits how many run at once", async () => {
    const script = there("date +%s%N; sleep 1; date +%s%N")
    const overlap = async (options: string): Promise<number> => {
      const { stdout } = await lab().edict(`${options} a,b,slow ${script}`)
      const times = new Map<string, number[]>()
      for (const [, name = "", time] of stdout.matchAll(/^(\w+) *│ (\d+)$/gm))
        times.set(name, [...(times.get(name) ?? []), Number(time)])
      const spans = [...times.values()]
      expect(spans.map((span) => span.length)).toEqual([2, 2, 2])
      return Math.max(
        ...spans.map(([start]) => spans.filter(([from, to]) => from! <= start! && start! < to!).length),
      )
    }
    expect(await overlap("")).toBe(3)
    expect(await overlap("--jobs 1")).toBe(1)
    expect(await overlap("--jobs=2")).toBe(2)
  })

  test("--fail-fast ends the rest, over there too; those that wait are not begun", async () => {
    const script = there('[ "$WHO" = b ] && { sleep 2; exit 7; }; echo begun; sleep 600; echo survived')
    const result = await lab().edict(`--fail-fast --jobs 2 a,b,slow ${script}`)
    expect(result.code).toBe(7)
    expect(result.stdout).toContain("a    │ begun")
    expect(result.stdout).not.toMatch(/survived|^slow/m)
    expect(result.stderr).toMatch(/^edict: a +stopped [^]*^edict: b +7 [^]*^edict: slow +- +not run$/m)
    expect(
      await eventually(
        () => sleepers(lab().hosts[0]!),
        (list) => list.length === 0,
      ),
    ).toEqual([])
  })

  test("without it the others go on", async () => {
    const result = await lab().edict(`a,b ${there('[ "$WHO" = b ] && exit 7; sleep 2; echo survived')}`)
    expect([result.code, result.stdout]).toEqual([7, "a │ survived\n"])
  })

  test.each(["SIGINT", "SIGTERM", "SIGHUP", "SIGKILL"] as const)("%s ends them all", async (signal) => {
    const run = lab().client.spawn(
      [
        EDICT,
        "--jobs",
        "2",
        "a,b,slow",
        "nix",
        "shell",
        ".#hello",
        "-c",
        "sh",
        "-c",
        "echo begun; sleep 600; echo survived",
      ],
      { cwd: "/root/p" },
    )
    await run.waitFor(/a .*begun[^]*b .*begun|b .*begun[^]*a .*begun/)
    await run.kill(signal)
    const result = await run.result
    expect(result.code).toBe({ SIGINT: 130, SIGTERM: 143, SIGHUP: 129, SIGKILL: 137 }[signal])
    for (const one of lab().hosts)
      expect(
        await eventually(
          () => sleepers(one),
          (list) => list.length === 0,
          20_000,
        ),
      ).toEqual([])
    expect(result.stdout).not.toContain("slow")
    const left = () =>
      lab()
        .client.processes()
        .then((list) => list.filter((line) => line.includes("a,b,slow") || line.includes("--link-suffix")))
    expect(await eventually(left, (list) => list.length === 0)).toEqual([])
  })

  test("Ctrl-C at a terminal reaches each host once: what was changed still comes home", async () => {
    await lab().tidy()
    const script = "echo changed >hello.txt; echo begun; sleep 600"
    const run = lab().client.spawn([EDICT, "a,b", "nix", "shell", ".#hello", "-c", "sh", "-c", script], {
      cwd: "/root/p",
      tty: true,
    })
    await run.waitFor(/begun[^]*begun/)
    run.write("\x03")
    const result = await run.result
    expect(result.code).toBe(130)
    expect(readFileSync(lab().file("hello.txt"), "utf8")).toBe("changed\n")
    expect(result.stdout).toMatch(/edict: a +130 [^]*edict: b +130 /)
    await lab().tidy()
  })

  test("--report is a list with what every host did", async () => {
    const result = await lab().edict("--report /root/r.json a,b,dead nix build .#hello")
    expect(result.code).toBe(255)
    const reports = JSON.parse(readFileSync(lab().client.outside("/root/r.json"), "utf8")) as unknown
    const own = (name: string) => ({
      host: name,
      state: "ended",
      exitCode: 0,
      seconds: expect.any(Number),
      resultLinks: [{ link: `/root/p/result-${name}`, target: readlinkSync(lab().file(`result-${name}`)) }],
      changed: [],
      conflicts: [],
    })
    expect(reports).toMatchObject([
      own("a"),
      own("b"),
      { host: "dead", state: "ended", exitCode: 255, resultLinks: [] },
    ])
    await lab().tidy()
  })

  test("the report of a host that is dead has the exit code", async () => {
    expect((await lab().edict("--report /root/r.json dead nix build .#hello")).code).toBe(255)
    const report = JSON.parse(readFileSync(lab().client.outside("/root/r.json"), "utf8")) as unknown
    expect(report).toMatchObject({ host: "dead", exitCode: 255, resultLinks: [] })
  })

  test("-q says nothing; --dry-run says it for each host", async () => {
    const quiet = await lab().edict("-q a,b nix build .#hello")
    expect([quiet.code, quiet.stdout, quiet.stderr.replace(/^.*building '.*\n/gm, "")]).toEqual([0, "", ""])
    const plans = JSON.parse((await lab().edict("-n --json a,b nix build .#hello")).stdout) as {
      host: string
    }[]
    expect(plans.map((plan) => plan.host)).toEqual(["a", "b"])
    const plan = await lab().edict("-n a,b nix build .#hello")
    expect(plan.stdout.match(/^ssh .*nix build/gm)).toHaveLength(2)
    await lab().tidy()
  })

  test("the words of --builders pass through untouched", async () => {
    const result = await lab().edict(
      `-n --json a nix build --builders 'ssh://x - ./key 1 ; @/etc/nix/machines' .#hello`,
    )
    const { command } = JSON.parse(result.stdout) as { command: string[] }
    expect(command.slice(0, 4)).toEqual([
      "nix",
      "build",
      "--builders",
      "ssh://x - ./key 1 ; @/etc/nix/machines",
    ])
  })
})

describe("changes that several hosts make", () => {
  const NAMES = ["a", "b", "c", "d"]
  const lab = shared(() => Lab.start(NAMES.map((name) => ({ name }))))

  /** Makes the commands of all hosts end in the same moment. */
  const together = (script: string) =>
    there(`now=$(date +%s); ${script}; while [ $(date +%s) -lt $((now / 4 * 4 + 8)) ]; do sleep 0.01; done`)

  test("equal ones come home once, however close; no conflict", async () => {
    for (let round = 0; round < 3; round++) {
      const files = Array.from({ length: 30 }, (_, at) => `f${at}.txt`)
      const script = `for f in ${files.join(" ")}; do echo ${round} >$f; done; mkdir -p deep/er; echo x >deep/er/new; rm -f old.txt; echo ${round} >version.txt; chmod +x script.sh`
      const result = await lab().edict(`a,b,c,d ${together(script)}`)
      expect(result.stderr).not.toContain("conflict")
      expect(result.code).toBe(0)
      for (const name of [...files, "version.txt"])
        expect(readFileSync(lab().file(name), "utf8")).toBe(`${round}\n`)
      expect(existsSync(lab().file("old.txt"))).toBe(false)
      expect(existsSync(lab().file(".git/edict/conflicts"))).toBe(false)
    }
    await lab().tidy()
  })

  test("equal flake.lock updates are no conflict", async () => {
    const result = await lab().edict("a,b,c,d nix flake lock .")
    expect(result.code).toBe(0)
    expect(result.stderr).not.toContain("conflict")
    await lab().tidy()
  })

  test("different ones are a conflict each: the first stays, all others are kept", async () => {
    const result = await lab().edict(`a,b,c ${together("uname -n >hello.txt")}`)
    expect(result.code).toBe(254)
    const mine = readFileSync(lab().file("hello.txt"), "utf8").trim()
    const kept = (await lab().sh("find .git/edict/conflicts -name hello.txt | xargs cat")).stdout
      .trim()
      .split("\n")
    expect([mine, ...kept].sort()).toEqual(["a", "b", "c"])
    expect(result.stderr.match(/^[abc] │ edict: conflict: hello\.txt /gm)).toHaveLength(2)
    await lab().tidy()
  })

  test("of --jobs 1 the second host works on what the first one left", async () => {
    const result = await lab().edict(`--jobs 1 a,b,c ${there("uname -n >>hello.txt")}`)
    expect(result.code).toBe(0)
    expect(readFileSync(lab().file("hello.txt"), "utf8")).toBe("hello\na\nb\nc\n")
    await lab().tidy()
  })

  test("trees go up once per host", async () => {
    await lab().edict("a,b,c,d nix eval .#lib.answer")
    const answers = await lab().edict("--report /root/r.json a,b,c,d nix eval .#lib.answer")
    expect(answers.stdout.split("\n").sort().slice(1)).toEqual(NAMES.map((name) => `${name} │ 42`))
    const reports = JSON.parse(readFileSync(lab().client.outside("/root/r.json"), "utf8")) as {
      bytesUp: number
    }[]
    expect(reports.map(({ bytesUp }) => bytesUp)).toEqual([0, 0, 0, 0])
    for (const one of lab().hosts)
      expect((await one.sh("ls -d .cache/edict/client-*/tree/root/p | wc -l")).stdout.trim()).toBe("1")
  })

  test("commits of several hosts: one moves the branch, the others wait as refs", async () => {
    const result = await lab().edict(
      `a,b ${together("uname -n >mine-$(uname -n); git add -A; git -c user.name=x -c user.email=x commit -qm $(uname -n)")}`,
    )
    expect(result.code).toBe(254)
    const head = (await lab().sh("git log -1 --format=%s")).stdout.trim()
    const waiting = (await lab().sh("git for-each-ref --format='%(refname)' refs/edict")).stdout
    expect(["a", "b"]).toContain(head)
    expect(waiting).toContain(`refs/edict/${head === "a" ? "b" : "a"}/`)
    await lab().sh("git for-each-ref --format='delete %(refname)' refs/edict | git update-ref --stdin")
    await lab().tidy()
  })
})

describe("picking one", () => {
  const OTHER = SYSTEM === "x86_64-linux" ? "aarch64-linux" : "x86_64-linux"
  const lab = shared(() =>
    Lab.start(
      [
        { name: "a" },
        { name: "b" },
        { name: "arm", shell: "fish", system: OTHER },
        { name: "bare", nix: "none" },
      ],
      {
        config: CONFIG,
        systems: [SYSTEM, OTHER],
      },
    ),
  )
  const CONFIG = `[hosts.a]\ntags = ["x"]\n[hosts.b]\ntags = ["x"]\n[hosts.arm]\n[hosts.bare]\n${DEAD}`
  const WHERE = there("uname -n")

  /** The host that a command ran on. */
  const picked = async (options: string, command = WHERE): Promise<string> => {
    const { stdout, stderr, code } = await lab().edict(`--pick ${options} ${command}`)
    return code === 0 ? stdout.trim() : `${code} ${stderr}`
  }

  test("of equals the first; then the one that was used last for this tree", async () => {
    const used = async (host: string) =>
      expect((await lab().edict(`${host} nix eval .#lib.answer`)).code).toBe(0)
    await lab().sh("rm -rf ~/.local/state/edict/last")
    expect(await picked("a,b")).toBe("a")
    await used("b")
    expect(await picked("a,b")).toBe("b")
    expect(await picked("@x")).toBe("b")
    await used("a")
    expect(await picked("b,a")).toBe("a")
    await lab().sh("mkdir -p /root/q && cp -r . /root/q")
    await lab().sh("cd /root/q && '" + EDICT + "' b nix eval .#lib.answer")
    expect(await picked("b,a")).toBe("a")
  })

  test("--system, the system of the installable, the one here", async () => {
    const uname = "nix eval --raw --impure --expr builtins.currentSystem"
    expect(await picked(`--system ${OTHER} a,b,arm`)).toBe("arm")
    expect(await picked("arm,a", uname)).toBe(SYSTEM)
    expect(await picked("a,arm", `nix eval --raw .#packages.${OTHER}.hello.system`)).toBe(OTHER)
    const verbose = await lab().edict(`--pick -v a,arm nix build .#packages.${OTHER}.hello --no-link`)
    expect(verbose.stderr).toContain(`pick: arm fits ${OTHER}`)
    const checks = await lab().edict(`--pick -v a,arm nix build .#checks.${OTHER}.hello --no-link`)
    expect(checks.stderr).toContain(`pick: arm fits ${OTHER}`)
    await Bun.write(lab().client.outside("/etc/nix/own.conf"), `system = ${OTHER}\n`)
    const own = await lab().sh(`NIX_USER_CONF_FILES=/etc/nix/own.conf edict --pick a,arm ${WHERE}`)
    expect(own.stdout.trim()).toBe("arm")
  })

  test("systems of the config win over what Nix there says", async () => {
    lab().configure(CONFIG.replace("[hosts.b]", `[hosts.b]\nsystems = ["riscv64-linux"]`))
    expect(await picked("--system riscv64-linux @all")).toBe("b")
    expect(await picked("b,a")).toBe("a")
    lab().configure(CONFIG)
  })

  test("speed: the faster of two", async () => {
    await lab().sh("rm -rf ~/.local/state/edict/last")
    lab().configure(CONFIG.replace("[hosts.b]", "[hosts.b]\nspeed = 50"))
    expect(await picked("a,b")).toBe("b")
    lab().configure(CONFIG)
  })

  test("features and mandatory features", async () => {
    await lab().sh("rm -rf ~/.local/state/edict/last")
    lab().configure(CONFIG.replace("[hosts.b]", '[hosts.b]\nspeed = 50\nfeatures = ["gpu"]'))
    expect(await picked("--features gpu a,b")).toBe("b")
    expect(await picked("--features gpu,kvm a,b")).toMatch(/with gpu, kvm: b lacks kvm; a lacks gpu;/)
    lab().configure(`machines = "machines"\n`)
    writeFileSync(
      lab().client.outside("/root/.config/edict/machines"),
      `a ${SYSTEM} - 1 1 - \nb ${SYSTEM} - 1 50 - gpu\n`,
    )
    expect(await picked("a,b")).toBe("a")
    expect(await picked("--features gpu @all")).toBe("b")
    expect(await picked("b")).toContain("b takes only what needs gpu")
    lab().configure(CONFIG)
  })

  test("dead ones are passed over, and named once", async () => {
    const result = await lab().edict(`--pick dead,a ${WHERE}`)
    expect(result.stdout).toBe("a\n")
    expect(result.stderr.match(/dead/g)).toHaveLength(2) // "dead is passed over: cannot reach dead: …"
    expect(result.stderr).toMatch(/^edict: dead is passed over: cannot reach dead: .*refused$/m)
    expect((await lab().edict(`-q --pick dead,a ${WHERE}`)).stderr).toBe("")
  })

  test("a host that hangs costs no more than the connect timeout", async () => {
    const server = Bun.listen({ hostname: "127.0.0.1", port: 0, socket: { data: () => undefined } })
    lab().configure(`${CONFIG}[hosts.hangs]\naddress = "ssh://root@127.0.0.1:${server.port}"\n`)
    let began = performance.now()
    expect(await picked("hangs,a")).toBe("a")
    expect(performance.now() - began).toBeLessThan(9000)
    began = performance.now()
    const list = await lab().edict("--hosts")
    expect(performance.now() - began).toBeLessThan(9000)
    expect(list.stdout).toMatch(/^hangs .* no: .*(timed out|no answer within 5 s)/m)
    expect(list.stdout).toMatch(/^a .* yes /m)
    began = performance.now()
    expect(await picked("-o ConnectTimeout=1 hangs,a")).toBe("a")
    expect(performance.now() - began).toBeLessThan(4500)
    server.stop(true)
    lab().configure(CONFIG)
  })

  test("nothing fits: each host and why", async () => {
    const result = await lab().edict("--pick --system riscv64-linux a,arm,bare,dead nix build .#hello")
    expect(result.code).toBe(254)
    const line = result.stderr.split("\n").find((text) => text.includes("no host fits"))!
    expect(line).toStartWith("edict: no host fits riscv64-linux: ")
    expect(line).toMatch(new RegExp(`\\ba is for ${SYSTEM}[,;]`))
    expect(line).toMatch(new RegExp(`\\barm is for ${OTHER}[,;]`))
    expect(line).toContain("bare has no Nix")
    expect(line).toContain("dead does not answer")
    expect(line).toContain("edict --hosts")
    expect(existsSync(lab().file("result"))).toBe(false)
  })

  test("-v shows the ranking", async () => {
    const { stderr } = await lab().edict(`--pick -v @all ${WHERE}`)
    const ranking = [...stderr.matchAll(/^edict: pick: (\w+) (fits|\w.*)/gm)].map(([, name, why]) => [
      name,
      why,
    ])
    expect(
      ranking
        .map(([name]) => name)
        .slice(0, 2)
        .sort(),
    ).toEqual(["a", "b"])
    expect(ranking.slice(0, 2).map(([, why]) => why)).toEqual(["fits", "fits"])
    expect(
      ranking
        .slice(2)
        .map(([name]) => name)
        .sort(),
    ).toEqual(["arm", "bare", "dead"])
  })

  test("a host that was named is never swapped", async () => {
    const result = await lab().edict("dead nix build .#hello")
    expect(result.code).toBe(255)
    expect((await lab().edict(`--pick dead ${WHERE}`)).code).toBe(254)
    expect((await lab().edict("bare nix build .#hello")).stderr).toContain("no nix over there")
  })

  test("the picked host's links have no suffix, its output no label", async () => {
    const result = await lab().edict("--pick a,b nix build .#hello")
    expect(result.code).toBe(0)
    expect(result.stderr).not.toContain("│")
    expect(readlinkSync(lab().file("result"))).toEndWith("-hello")
  })

  test("--hosts lists what the config says and what each host says", async () => {
    lab().configure(
      `${CONFIG}[hosts.told]\naddress = "ssh://root@a"\nsystems = ["riscv64-linux"]\nfeatures = ["gpu"]\nspeed = 2.5\ntags = ["x", "y"]\n`,
    )
    const result = await lab().edict("--hosts")
    expect(result.code).toBe(0)
    expect(result.stderr).toBe("")
    const [head, ...rows] = result.stdout.trimEnd().split("\n")
    expect(head!.split(/\s+/)).toEqual(
      "name address systems features speed tags reachable latency nix free load trees".split(" "),
    )
    const row = (name: string) => rows.find((line) => line.startsWith(`${name} `))!
    expect(rows.map((line) => line.split(" ")[0])).toEqual(["a", "b", "arm", "bare", "dead", "told"])
    expect(row("told")).toMatch(
      /^told +ssh:\/\/root@a +riscv64-linux +gpu +2\.5 +x,y +yes +\d+ ms +2\.8\.0 +[\d.]+ GiB +[\d.]+ +[\d.]+ MiB$/,
    )
    expect(row("a")).toMatch(new RegExp(`^a +a +${SYSTEM}\\S* +\\S*big-parallel\\S* +1 +x +yes `))
    expect(row("bare")).toMatch(/^bare +bare +- +- +1 +- +yes +\d+ ms +none /)
    expect(row("dead")).toMatch(
      /^dead +ssh:\/\/root@127\.0\.0\.1:1 +- +- +1 +- +no: cannot reach dead: .*refused$/,
    )
    const list = JSON.parse((await lab().edict("--hosts --json")).stdout) as Record<string, unknown>[]
    expect(list.at(-1)).toEqual({
      name: "told",
      address: "ssh://root@a",
      systems: ["riscv64-linux"],
      features: ["gpu"],
      mandatoryFeatures: [],
      speed: 2.5,
      tags: ["x", "y"],
      reachable: true,
      why: null,
      latencyMilliseconds: expect.any(Number),
      nix: "nix (Nix) 2.8.0",
      freeKibibytes: expect.any(Number),
      usedKibibytes: expect.any(Number),
      load: expect.any(Number),
    })
    expect(list[4]).toMatchObject({
      name: "dead",
      reachable: false,
      why: expect.stringContaining("refused"),
      nix: null,
      latencyMilliseconds: null,
    })
    lab().configure("")
    expect(await lab().edict("--hosts")).toMatchObject({ code: 254, stdout: "" })
    expect(await lab().edict("--hosts --json")).toMatchObject({ code: 0, stdout: "[]\n" })
    lab().configure(CONFIG)
  })
})

describe("the machines file in use", () => {
  const lab = shared(() => Lab.start([{ name: "a" }, { name: "b" }]))
  const machines = (text: string) => writeFileSync(lab().client.outside("/root/.config/edict/list"), text)
  const key = (one: Host) => Buffer.from(one.hostKey()).toString("base64")
  const say = there("uname -n")

  test("its hosts can be named and tagged; those of the config win", async () => {
    lab().configure('machines = "list"\n[hosts.b]\nenv = { WHO = "config" }\n')
    machines("ssh://a ; ssh-ng://b - - 1 9\n")
    expect((await lab().edict(`a ${say}`)).stdout).toBe("a\n")
    expect((await lab().edict(`@all ${there('echo "$WHO"')}`)).stdout.split("\n").sort()).toEqual([
      "",
      "a │ ",
      "b │ config",
    ])
    const list = JSON.parse((await lab().edict("--hosts --json")).stdout) as { name: string; speed: number }[]
    expect(list.map(({ name, speed }) => [name, speed])).toEqual([
      ["a", 1],
      ["b", 1],
    ])
  })

  test("a key file", async () => {
    lab().configure('machines = "~/.config/edict/list"\n')
    await lab().sh(
      "rm -rf /tmp/edict-0; cp ~/.ssh/id_ed25519 /root/key && sed -i 's,IdentityFile.*,IdentityFile /root/none,' ~/.ssh/config",
    )
    machines("ssh://a\nssh://b - /root/key")
    expect((await lab().edict(`b ${say}`)).stdout).toBe("b\n")
    expect((await lab().edict(`a ${say}`)).stderr).toContain("Permission denied")
    await lab().sh("sed -i 's,IdentityFile.*,IdentityFile /root/.ssh/id_ed25519,' ~/.ssh/config")
  })

  test("the host key is verified: the right one suffices, a wrong one fails, whatever ssh_config says", async () => {
    const [a, b] = lab().hosts as [Host, Host]
    await lab().sh(
      "mv ~/.ssh/known_hosts ~/.ssh/known; sed -i 's,StrictHostKeyChecking.*,StrictHostKeyChecking no,' ~/.ssh/config; rm -rf /tmp/edict-0",
    )
    lab().configure('machines = "list"\n')
    machines(`ssh://a - - - - - - ${key(a)}\nssh://b - - - - - - ${key(a)}\n`)
    const right = await lab().edict(`a ${say}`)
    expect([right.code, right.stdout]).toEqual([0, "a\n"])
    expect((await lab().edict("a nix build .#hello")).code).toBe(0)
    const wrong = await lab().edict(`b ${say}`)
    expect([wrong.code, wrong.stdout]).toEqual([255, ""])
    expect(wrong.stderr).toMatch(
      /Host key for b has changed.*; try: .*put the new key into the machines file\n$/,
    )
    expect((await lab().edict("--hosts")).stdout).toMatch(/^b .* no: .*Host key for b has changed/m)
    machines(`ssh://b - - - - - - ${key(b)}\n`)
    expect((await lab().edict(`b ${say}`)).stdout).toBe("b\n")
    await lab().sh(
      "mv ~/.ssh/known ~/.ssh/known_hosts; sed -i 's,StrictHostKeyChecking.*,StrictHostKeyChecking yes,' ~/.ssh/config",
    )
  })

  test("includes are read beside the file, never in the project", async () => {
    lab().configure('machines = "list"\n')
    machines("@more\nssh://a")
    writeFileSync(lab().file("more"), "ssh://evil")
    writeFileSync(lab().file("list"), "ssh://evil")
    writeFileSync(lab().client.outside("/root/.config/edict/more"), "ssh://b # comment")
    const list = JSON.parse((await lab().edict("--hosts --json")).stdout) as { name: string }[]
    expect(list.map(({ name }) => name)).toEqual(["b", "a"])
    await lab().tidy()
  })

  test("what is wrong with it is said with file and field", async () => {
    lab().configure('machines = "list"\n')
    machines("ssh://a x k 1 fast")
    expect((await lab().edict("a nix build")).stderr).toStartWith(
      "edict: /root/.config/edict/list: ssh://a: the fifth field (speed) must be a number, not fast",
    )
    lab().configure('machines = "gone"\n')
    const gone = await lab().edict("a nix build")
    expect(gone.stderr).toStartWith(
      "edict: /root/.config/edict/config.toml: machines must be a file that can be read",
    )
    expect(gone.code).toBe(254)
  })

  test("keys of the config: directory, ssh-options, address", async () => {
    const [, b] = lab().hosts as [Host, Host]
    lab().configure(
      `[hosts.x]\naddress = "ssh://root@127.0.0.1:${b.port}"\nssh-options = ["-o", "HostKeyAlias=[127.0.0.1]:${b.port}", "-i", "~/.ssh/id_ed25519"]\ndirectory = "~/else/where"\n`,
    )
    expect((await lab().edict(`x ${say}`)).stdout).toBe("b\n")
    expect((await b.sh("ls -d else/where/client-*/tree/root/p")).code).toBe(0)
    lab().configure(`[hosts.b]\ndirectory = "/tmp/abs"\n`)
    expect((await lab().edict(`b ${say}`)).stdout).toBe("b\n")
    expect((await b.sh("ls -d /tmp/abs/client-*/tree/root/p")).code).toBe(0)
  })

  test("a host uses its own builders", async () => {
    const [a, b] = lab().hosts as [Host, Host]
    const made = await a.sh(
      `ssh-keygen -q -t ed25519 -N '' -f ~/.ssh/id && cat ~/.ssh/id.pub &&
      printf '%s\\n' 'Host b' ' HostName 127.0.0.1' ' Port ${b.port}' ' IdentityFile ~/.ssh/id' ' StrictHostKeyChecking no' >~/.ssh/config &&
      echo 'ssh://b ${SYSTEM} /root/.ssh/id 4 1' >/etc/nix/machines && echo 'max-jobs = 0' >>/etc/nix/nix.conf`,
    )
    await b.sh(`cat >>~/.ssh/authorized_keys`, { stdin: made.stdout })
    lab().configure("[hosts.a]\n")
    await lab().sh("echo built elsewhere >hello.txt")
    const result = await lab().edict("a nix build .#hello")
    expect(result.code).toBe(0)
    expect(result.stderr).toMatch(/building '.*-hello\.drv' on 'ssh:\/\/b'/)
    expect(readFileSync(lab().client.outside(readlinkSync(lab().file("result"))), "utf8")).toBe(
      "built elsewhere\n",
    )
    const named = await lab().edict(`a nix build .#multi --builders "ssh://b ${SYSTEM} /root/.ssh/id"`)
    expect(named.stderr).toMatch(/building '.*-multi\.drv' on 'ssh:\/\/b'/)
    await lab().tidy()
  })
})

test("twenty hosts at once", async () => {
  const names = Array.from({ length: 20 }, (_, at) => `h${at}`)
  const lab = await Lab.start(names.map((name) => ({ name })))
  try {
    const result = await lab.edict("@all nix build .#hello", { timeout: 100_000 })
    expect(result.stderr).not.toMatch(/conflict|bug|cannot/)
    expect(result.code).toBe(0)
    const links = new Set(names.map((name) => readlinkSync(lab.file(`result-${name}`))))
    expect(links.size).toBe(1)
    const write = "@all nix shell .#hello -c sh -c 'echo 2 >version.txt'"
    const changed = await lab.edict(write, { timeout: 100_000 })
    expect(changed.stderr).not.toMatch(/conflict|bug|cannot/)
    expect(changed.code).toBe(0)
    expect(readFileSync(lab.file("version.txt"), "utf8")).toBe("2\n")
    const list = JSON.parse((await lab.edict("--hosts --json")).stdout) as { reachable: boolean }[]
    expect(list.map(({ reachable }) => reachable)).toEqual(names.map(() => true))
  } finally {
    await lab.stop()
  }
})
