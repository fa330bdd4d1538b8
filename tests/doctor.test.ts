/** What --doctor finds, what --clean removes, and which trees go by themselves. */

import { afterAll, beforeAll, describe, expect, setDefaultTimeout, test } from "bun:test"
import { mkdirSync, writeFileSync } from "node:fs"
import { chooseHosts, examineHost, parseArguments, parseConfig, type Finding, type Probe } from "../edict"
import { GIT_INIT, writeFlake } from "./lab/flake"
import { startClient, startHost, type Client, type Host, type HostOptions, type Result } from "./lab/lab"
import { EDICT, project, type Project } from "./support"

setDefaultTimeout(120_000)

type Report = {
  works: boolean
  here: Finding[]
  hosts: { host: string; works: boolean; findings: Finding[] }[]
}

/** Findings that are not ok, with what mends them. */
const complaints = (findings: readonly Finding[]): string[] =>
  findings.flatMap(({ level, what, mend }) => (level === "ok" ? [] : [`${level}: ${what}; ${mend ?? ""}`]))

async function eventually<T>(ask: () => Promise<T>, wanted: (answer: T) => boolean): Promise<T> {
  const end = performance.now() + 20_000
  for (;;) {
    const answer = await ask()
    if (wanted(answer) || performance.now() > end) return answer
    await Bun.sleep(100)
  }
}

describe("what is said of a host", () => {
  const GOOD: Record<string, string> = {
    end: "yes", writable: "yes", user: "ed", groups: "ed wheel", shell: "/bin/bash", kernel: "Linux x86_64",
    nix: "nix (Nix) 2.24.1", "nix.path": "/usr/bin/nix", rsync: "rsync  version 3.2.7", git: "git version 2.39.5",
    "set.system": "x86_64-linux", "set.sandbox": "true", "set.experimental-features": "nix-command flakes",
    "free.store": String(50 * 2 ** 20), "free.trees": String(50 * 2 ** 20), used: "100",
    ...Object.fromEntries(
      "find stat awk tr xargs tar sed paste mkfifo cmp readlink ps".split(" ").map((tool) => [`tool.${tool}`, "yes"]),
    ),
  } // prettier-ignore
  type Store = Parameters<typeof examineHost>[2]

  async function said(
    facts: Record<string, string | undefined>,
    more: Partial<Probe> & { toml?: string; store?: Store } = {},
  ) {
    const { toml = "", store = "takes all", ...probe } = more
    const config = await parseConfig(`[hosts.h]\n${toml}`, "/c")
    const host = chooseHosts(config, await parseArguments(["h", "nix"], {}), { HOME: "/" })[0]!
    const known = Object.entries({ ...GOOD, ...facts }).filter(
      (pair): pair is [string, string] => pair[1] !== undefined,
    )
    return examineHost(
      { host, facts: new Map(known), multiplexed: true, latency: 3, skew: 0, ...probe },
      {},
      store,
    )
  }

  test("nothing to complain about", async () => expect(complaints(await said({}))).toEqual([]))

  type Row = [facts: Record<string, string | undefined>, more: Parameters<typeof said>[1], complaint: string]
  const rows: Row[] = [
    [{ nix: "" }, {}, "problem: no Nix there, neither on the PATH of a non-interactive shell nor in a profile; ssh h 'curl"],
    [{ nix: "nix (Nix) 2.3.16" }, {}, "problem: nix (Nix) 2.3.16 at /usr/bin/nix is too old: flakes came with 2.4; ssh h 'curl"],
    [{ rsync: "" }, {}, "warning: no rsync there: files go up by tar; ssh h 'nix --extra-experimental-features"],
    [{ rsync: "", nix: "nix (Nix) 2.8" }, { toml: 'address = "ssh://u@h:7"' }, "warning: no rsync there: files go up by tar; ssh -p 7 u@h 'nix"],
    [{ git: "" }, {}, "warning: no git there: commits of the command do not come home; ssh h 'nix"],
    [{ git: "", nix: "nix (Nix) 2.19.2" }, {}, "problem: no git there, which this Nix needs for flakes in git; ssh h 'nix"],
    [{ git: "", nix: "nix (Determinate Nix 3.22.2) 2.36.0" }, {}, "warning: no git there"],
    [{ "tool.cmp": undefined, "tool.awk": undefined }, {}, "problem: no awk, cmp there; install"],
    [{ "tool.ps": undefined }, {}, "warning: no ps there"],
    [{ "set.sandbox": "false" }, {}, "warning: builds run without a sandbox; sandbox = true"],
    [{ writable: undefined }, {}, "problem: cannot write to .cache/edict there; directory = "],
    [{ "free.trees": "2048" }, {}, "problem: 2.0 MiB free for trees, 0.1 MiB used in .cache/edict; edict --clean h"],
    [{ "free.trees": "1048576" }, {}, "warning: 1.0 GiB free for trees"],
    [{ "free.store": "20480" }, {}, "warning: 20.0 MiB free for its store; ssh h nix-collect-garbage"],
    [{ "free.store": "0" }, {}, "problem: 0.0 MiB free for its store"],
    [{}, { skew: 61 }, "warning: its clock is 61 s ahead; edict compares no clocks, but Nix and git do; ssh h 'timedatectl"],
    [{}, { skew: -3600 }, "warning: its clock is 3600 s behind"],
    [{}, { multiplexed: false }, "warning: no multiplexing: each step connects anew; ssh h 'grep"],
    [{}, { toml: "forward-agent = true" }, "warning: the agent is to be forwarded, but none runs here; eval"],
    [{}, { store: "takes signed" }, "problem: the store here takes only signed results from this user, and Nix there signs nothing; import"],
    [{ "set.secret-key-files": "/k" }, { store: "takes signed" }, "warning: the store here takes only signed results"],
    [{}, { toml: "require-signatures = true" }, "problem: of this host only signed results may come home (require-signatures), and Nix there signs nothing; secret-key-files"],
    [{ end: undefined }, {}, "warning: answers slowly: not all could be asked; ssh -v h true"],
    [{}, { error: "cannot reach h: x" }, "problem: cannot reach h: x; ssh -v h true"],
  ] // prettier-ignore
  test.each(rows)("%j %j: %s", async (facts, more, complaint) => {
    const found = complaints(await said(facts, more))
    expect(found).toHaveLength(1)
    expect(found[0]).toStartWith(complaint)
  })

  test("what is fine all the same", async () => {
    expect(complaints(await said({}, { toml: 'import = "sudo"', store: "takes signed" }))).toEqual([])
    expect(complaints(await said({}, { store: "none" }))).toEqual([])
    expect(complaints(await said({ "set.experimental-features": "" }))).toEqual([])
    expect(complaints(await said({}, { skew: 4 }))).toEqual([])
    const trusted = async (facts: Record<string, string | undefined>) =>
      (await said(facts)).some(({ what }) => what === "this user is trusted by the store there")
    expect(await trusted({})).toBe(false)
    for (const facts of [
      { "set.trusted-users": "root @wheel" },
      { "set.trusted-users": "*" },
      { store: '{"trusted":1}' },
      { user: "root" },
    ])
      expect(await trusted(facts)).toBe(true)
  })
})

describe("the doctor on real hosts", () => {
  const HOSTS: HostOptions[] = [
    { name: "good", flakes: true },
    { name: "fishy", shell: "fish", nix: "none" },
    { name: "norsync", hide: ["rsync"] },
    { name: "nogit", hide: ["git"] },
    { name: "single", sshdConfig: ["MaxSessions 1"], hide: ["fish"] },
    { name: "full", diskLimit: "3m" },
  ]
  let hosts: Host[], client: Client
  beforeAll(async () => {
    hosts = await Promise.all(HOSTS.map(startHost))
    client = await startClient({ hosts })
    writeFlake(client.outside("/root/p"), {})
    await client.sh(`cd /root/p && ${GIT_INIT}`)
  })
  afterAll(async () => {
    await Promise.all([client.stop(), ...hosts.map((host) => host.stop())])
  })
  const edict = (words: string): Promise<Result> =>
    client.sh(`edict() { '${EDICT}' "$@"; }\nedict ${words}`, { cwd: "/root/p" })
  /** The lab builds without one. */
  const SANDBOX = "warning: builds run without a sandbox; sandbox = true in its nix.conf"
  /** What it says of one host, and whether its word is true. */
  const examine = async (name: string): Promise<string[]> => {
    const { stdout, stderr, code } = await edict(`--doctor --json ${name}`)
    expect(stderr).toBe("")
    const report = JSON.parse(stdout) as Report
    expect(complaints(report.here)).toEqual([])
    expect(report.works).toBe(code === 0)
    expect(report.hosts.map(({ host, works }) => [host, works])).toEqual([[name, code === 0]])
    const build = await edict(`${name} nix build .#hello`)
    expect([name, build.code === 0]).toEqual([name, report.works])
    return complaints(report.hosts[0]!.findings)
  }

  test("a healthy one: 0, and one screen", async () => {
    expect(await examine("good")).toEqual([SANDBOX])
    const { stdout, code } = await edict("--doctor good")
    expect(code).toBe(0)
    const lines = stdout.trimEnd().split("\n")
    expect(lines.length).toBeLessThan(40)
    expect(lines[0]).toBe("here")
    expect(lines).toContain("good")
    for (const part of ["answers in ", "multiplexing", "login shell /bin/bash", "nix (Nix) 2.8.0 at /usr/bin/nix", "flakes are enabled",
      "rsync version 3", "git version 2", "builds for ", "free for its store", "free for trees", "its clock is right",
      "trusted by the store there", "trusted by the store here", "unsigned results can come home", "substituters none", "the ssh agent stays here"])
      expect(lines.filter((line) => line.startsWith("  ok       ") && line.includes(part))).toHaveLength(1) // prettier-ignore
  })

  test("without Nix, under fish", async () => {
    expect(await examine("fishy")).toEqual([expect.stringContaining("problem: no Nix there")])
    expect((await edict("--doctor fishy")).stdout).toContain("  ok       login shell /bin/fish\n")
  })

  test("without rsync; without git", async () => {
    expect(await examine("norsync")).toContainEqual(expect.stringContaining("warning: no rsync there"))
    expect(await examine("nogit")).toContainEqual(
      expect.stringContaining("problem: no git there, which this Nix needs"),
    )
  })

  test("a server that takes one session only", async () => {
    expect(await examine("single")).toContainEqual(expect.stringContaining("warning: no multiplexing"))
  })

  test("a clock that is off", async () => {
    const single = hosts.find(({ name }) => name === "single")!
    const text = `#!/bin/sh\n[ "$*" = +%s ] && exec /bin/echo $(($(/usr/bin/date +%s) - 500))\nexec /usr/bin/date "$@"\n`
    expect(
      (await single.sh("cat >/usr/local/bin/date && chmod +x /usr/local/bin/date", { stdin: text })).code,
    ).toBe(0)
    expect(await examine("single")).toContainEqual(
      expect.stringMatching(/^warning: its clock is (499|500|501) s behind/),
    )
  })

  test("a full disk", async () => {
    const full = hosts.find(({ name }) => name === "full")!
    await full.sh("head -c 10m /dev/zero >/root/fill")
    expect(await examine("full")).toContainEqual(expect.stringContaining("problem: 0.0 MiB free for trees"))
  })

  test("several at once, one of them dead: 254, each with its own word; a line that mends stands below", async () => {
    const { stdout, code } = await edict("--doctor good root@127.0.0.1,good")
    expect(code).toBe(254)
    expect(stdout).toMatch(
      /\nroot@127\.0\.0\.1\n {2}problem {2}cannot reach root@127\.0\.0\.1: .*\n {11}ssh -v root@127\.0\.0\.1 true\n/,
    )
    const report = JSON.parse((await edict("--doctor --json good root@127.0.0.1")).stdout) as Report
    expect(report.hosts.map(({ works }) => works)).toEqual([true, false])
  })

  test("nothing of it stays over there", async () => {
    const good = hosts.find(({ name }) => name === "good")!
    await edict("--clean good")
    await edict("--doctor good")
    expect((await good.sh("ls -d /root/.cache/edict")).code).not.toBe(0)
  })
})

test("a user whom the store here does not trust is told so, and what would help", async () => {
  await using p = await project({ client: { hide: ["fish"] } })
  const made = await p.client.sh(`set -e
    echo 'u:x:4711:4711::/tmp/u:/bin/bash' >>/etc/passwd; echo 'u:x:4711:' >>/etc/group
    mkdir /tmp/u; cp -r /root/.ssh /tmp/u; sed -i 's,/root/,/tmp/u/,' /tmp/u/.ssh/config
    nix-store --version >/dev/null; mkdir -p /nix/var/nix/profiles/per-user /nix/var/nix/gcroots/per-user
    chmod 1777 /nix/var/nix/profiles/per-user /nix/var/nix/gcroots/per-user; chown -R u:u /tmp/u`)
  expect(made.stderr).toBe("")
  const daemon = p.client.spawn(["nix-daemon"])
  await eventually(
    () => p.client.sh("[ -S /nix/var/nix/daemon-socket/socket ]"),
    ({ code }) => code === 0,
  )
  const examine = (config: string) => {
    writeFileSync(p.client.outside("/tmp/c.toml"), config)
    const user = ["setpriv", "--reuid=4711", "--regid=4711", "--clear-groups", EDICT]
    const words = ["--config", "/tmp/c.toml", "--doctor", "h"]
    return p.client.run([...user, ...words], { cwd: "/tmp/u", env: { HOME: "/tmp/u", USER: "u" } })
  }
  const plain = await examine("")
  expect(plain.stdout).toContain("ok       this user is not trusted by the store here\n")
  expect(plain.stdout).toMatch(
    /problem {2}the store here takes only signed results from this user.*\n +import = "sudo"/,
  )
  expect(plain.code).toBe(254)
  const sudo = await examine('[hosts.h]\nimport = "sudo"\n')
  expect(sudo.stdout).toContain("ok       unsigned results come home through sudo")
  expect(sudo.code).toBe(0)
  await daemon.kill("SIGKILL")
})

describe("--clean and what goes by itself", () => {
  let p: Project
  beforeAll(async () => {
    p = await project({})
    mkdirSync(p.client.outside("/root/.config/edict"), { recursive: true })
    writeFileSync(p.client.outside("/root/.config/edict/config.toml"), "[hosts.h]\n")
  })
  afterAll(() => p[Symbol.asyncDispose]())
  const list = async () => (await p.host.sh("ls -A /root/.cache/edict 2>/dev/null")).stdout.trim()
  const used = async () =>
    (JSON.parse((await p.edict(["--hosts", "--json"])).stdout) as { usedKibibytes: number }[])[0]!
      .usedKibibytes

  test("says how much it removes; --hosts says how much there is; a run afterwards works", async () => {
    await p.sh("head -c 5m /dev/urandom >data && git add data && git commit -qm data")
    expect((await p.edict(["h", "nix", "build", ".#hello"])).code).toBe(0)
    const before = await used()
    expect(before).toBeGreaterThan(5000)
    const clean = await p.edict(["--clean", "h"])
    expect([clean.code, clean.stdout]).toEqual([0, ""])
    const [, removed] = /^edict: h: ([\d.]+) MiB removed\n$/.exec(clean.stderr) ?? []
    expect(Math.abs(Number(removed) - before / 1024)).toBeLessThan(0.2)
    expect(await list()).toBe("")
    expect(await used()).toBe(0)
    expect((await p.edict(["--clean", "h"])).stderr).toBe("edict: h: there was nothing to remove\n")
    await p.sh("rm -f result; echo 2 >hello.txt")
    expect((await p.sh("edict h nix build .#hello && cat result")).stdout).toBe("2\n")
  })

  test("only what edict made goes from its directory", async () => {
    writeFileSync(p.client.outside("/root/own.toml"), '[hosts.h]\ndirectory = "~/mine"\n')
    await p.host.sh("mkdir -p ~/mine/thesis ~/mine/.git && echo 1 >~/mine/notes && touch ~/mine/thesis/meta")
    expect((await p.sh("edict --config ~/own.toml h nix eval .#lib.answer")).stdout).toBe("42\n")
    expect((await p.host.sh("ls -d ~/mine/client-*")).code).toBe(0)
    expect((await p.sh("edict --config ~/own.toml --clean h")).code).toBe(0)
    expect((await p.host.sh("ls -A ~/mine")).stdout.split("\n")).toEqual([".git", "notes", "thesis", ""])
  })

  test("refuses while a command runs there, in whichever stage, and removes nothing then", async () => {
    const run = p.spawn(["h", "nix", "run", ".#wait", "--", "600"])
    await run.waitFor("waiting")
    const before = await used()
    const refused = await p.edict(["--clean", "h"])
    expect(refused.code).toBe(254)
    expect(refused.stderr).toMatch(
      /^edict: h: nothing removed: a run is using it \(process \d+\); try: again when it has ended\n$/,
    )
    expect(await used()).toBeGreaterThanOrEqual(before - 8)
    await run.kill("SIGTERM")
    expect((await run.result).code).toBe(143)
    const again = await eventually(
      () => p.edict(["--clean", "h"]),
      ({ code }) => code === 0,
    )
    expect(again.stderr).toContain("MiB removed")
    expect(await list()).toBe("")
  })

  test("the number of a process that is another one now does not keep it from cleaning", async () => {
    expect((await p.edict(["h", "nix", "eval", ".#lib.answer"])).code).toBe(0)
    const sleeper = p.host.spawn(["sleep", "60"])
    await eventually(
      () =>
        p.host.sh(
          "pidof sleep >/dev/null && mkdir -p ~/.cache/edict/run/old && pidof sleep >~/.cache/edict/run/old/pid",
        ),
      ({ code }) => code === 0,
    )
    expect((await p.edict(["--clean", "h"])).code).toBe(0)
    expect(await list()).toBe("")
    await sleeper.kill("SIGKILL")
  })

  test("a dead host: 255, and others are cleaned all the same", async () => {
    await p.edict(["h", "nix", "eval", ".#lib.answer"])
    const result = await p.edict(["--clean", "ssh://root@127.0.0.1:1", "h"])
    expect(result.code).toBe(255)
    expect(result.stderr).toContain("cannot reach ssh://root@127.0.0.1:1")
    expect(result.stderr).toMatch(/^edict: h: [\d.]+ MiB removed$/m)
  })

  test("trees that were not used for 30 days go; one that a used tree lies in stays", async () => {
    await p.sh(
      `for d in /root/old /root/outer /root/outer/inner; do mkdir -p $d; cp flake.nix settings.json hello.txt $d; done`,
    )
    const use = (dir: string) => p.sh(`cd ${dir} && edict h nix eval path:$PWD#lib.answer`)
    for (const dir of ["/root/old", "/root/outer", "/root/outer/inner", p.dir])
      expect((await use(dir)).stdout).toBe("42\n")
    const trees = async () =>
      (
        await p.host.sh(
          "cd /root/.cache/edict/client-*/tree/root && ls -d old outer outer/inner p 2>/dev/null; ls ../../meta | wc -l",
        )
      ).stdout
        .trim()
        .split("\n")
    expect(await trees()).toEqual(["old", "outer", "outer/inner", "p", "4"])
    const age = await p.host.sh(
      `cd /root/.cache/edict/client-*/meta && for m in *; do case $(head -n 1 $m/path) in */inner | */p) ;; */outer | */old) touch -d '31 days ago' $m ;; esac; done`,
    )
    expect(age.code).toBe(0)
    expect((await use(p.dir)).stdout).toBe("42\n")
    expect(await trees()).toEqual(["outer", "outer/inner", "p", "2"])
    expect((await use("/root/outer")).stdout).toBe("42\n")
    expect((await use("/root/old")).stdout).toBe("42\n")
    await p.host.sh(`cd /root/.cache/edict/client-*/meta && touch -d '29 days ago' *`)
    await use(p.dir)
    expect(await trees()).toEqual(["old", "outer", "outer/inner", "p", "4"])
  })
})
