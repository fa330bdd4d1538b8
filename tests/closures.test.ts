// How store paths travel: what is streamed, who may take it, and what a broken transfer leaves.
import { afterAll, beforeAll, beforeEach, describe, expect, test } from "bun:test"
import { existsSync, lstatSync, readFileSync, readlinkSync, writeFileSync } from "node:fs"
import { batchesOf, parseRegistrations, progressLine, unsignedPaths } from "../edict"
import { type FlakeOptions } from "./lab/flake"
import { nixAvailable, type Client, type Host, type NixVersion, type Result, type Running } from "./lab/lab"
import { EDICT, project, type Project } from "./support"

/** Attributes for nix-build: `wide` refers to `n` small paths, `chain` is ten in a row, `heavy` has some MiB. */
const DEFAULT_NIX = `{ n ? 300, long ? "p", salt ? "", bytes ? 1000 }:
let
  build = name: more: script: derivation ({
    inherit name salt;
    system = builtins.currentSystem;
    builder = "/bin/sh";
    args = [ "-euc" script ];
    PATH = "/bin:/usr/bin";
  } // more);
  small = i: builtins.toFile "\${long}-\${toString i}" "\${toString i} \${salt}";
  link = next: i: build "chain-\${toString i}" { inherit next; } ''mkdir "$out"; ln -s "$next" "$out/next"'';
in rec {
  one = build "one" { } ''echo "one $salt" >"$out"'';
  wide = build "wide" { paths = builtins.genList small n; passAsFile = [ "paths" ]; }
    ''tr ' ' '\\n' <"$pathsPath" >"$out"'';
  chain = builtins.foldl' link (build "chain-0" { } ''echo end >"$out"'') (builtins.genList (i: i + 1) 9);
  heavy = build "heavy" { first = chain; } ''
    mkdir "$out"; ln -s "$first" "$out/first"; head -c ${"${toString bytes}"} /dev/urandom >"$out/data"'';
  top = build "top" { inherit heavy; } ''mkdir "$out"; ln -s "$heavy" "$out/heavy"'';
}
`
/** Bytes of a path that no longer comes with others. */
const LARGE = "70000000"

const FLAKE: FlakeOptions = { files: { "default.nix": DEFAULT_NIX } }

/** Makes /usr/bin a directory of the machine's own, in which programs can be replaced. */
const HIDE = { hide: ["fish"] }
const VERBOSE = { sshdConfig: ["LogLevel VERBOSE"] }

const VERSIONS: NixVersion[] = ["2.8", "2.26", "2.34"]
const available = new Map(
  await Promise.all(VERSIONS.map(async (nix) => [nix, (await nixAvailable(nix)) === true] as const)),
)

/** How many commands sshd has started. */
const sessions = (host: Host): number => host.log().match(/Starting session: /g)?.length ?? 0

/** A script in front of a program; "$real" is the program itself. Every call is one line of /tmp/calls. */
async function wrap(machine: Host | Client, program: string, script = ""): Promise<void> {
  const text = `#!/bin/sh
real=/usr/bin/${program}
echo "${program} $*" >>/tmp/calls
${script}
exec "$real" "$@"
`
  const { code, stderr } = await machine.sh(
    `cat >/usr/local/bin/${program}.new && chmod 755 /usr/local/bin/${program}.new &&
    mv /usr/local/bin/${program}.new /usr/local/bin/${program} && touch /tmp/calls && chmod 666 /tmp/calls`,
    { stdin: text },
  )
  if (code !== 0) throw new Error(stderr)
}

const unwrap = (machine: Host | Client): Promise<Result> =>
  machine.sh("rm -f /usr/local/bin/nix-store /usr/local/bin/sudo; : >/tmp/calls")

/** What the calls of a wrapped program were: those with this option, as words. */
function calls(machine: Host | Client, option: string): string[][] {
  const file = machine.outside("/tmp/calls")
  const all = existsSync(file) ? readFileSync(file, "utf8").split("\n") : []
  return all.map((line) => line.split(" ")).filter((words) => words.includes(option))
}

const isPath = (word: string): boolean => word.startsWith("/nix/store/")

/** The store paths that the host was asked to export, of all calls together. */
const exported = (host: Host): string[] => calls(host, "--export").flatMap((words) => words.filter(isPath))

/** Which paths of a closure are not valid on the machine. */
async function invalid(machine: Host | Client, path: string): Promise<string> {
  const { stdout, stderr, code } = await machine.sh(
    `nix-store --check-validity ${path} && nix-store --check-validity $(nix-store -qR ${path})`,
  )
  return code === 0 ? "" : stdout + stderr + String(code)
}

/** What Nix finds wrong with the store; the line that it always prints left out. */
async function verify(machine: Client): Promise<string> {
  const { code, stdout, stderr } = await machine.sh("nix-store --verify --check-contents")
  const usual =
    /^(reading the Nix store|checking path existence|checking hashes|checking link|checking store).*\n/gm
  return `${code} ${(stdout + stderr).replace(usual, "")}`
}

const ownLines = (result: Pick<Result, "stderr">): string[] =>
  result.stderr.split("\n").filter((line) => line.startsWith("edict:"))

async function eventually(what: string, holds: () => boolean | Promise<boolean>): Promise<void> {
  const end = performance.now() + 30_000
  while (!(await holds())) {
    if (performance.now() > end) throw new Error(`not in time: ${what}`)
    await Bun.sleep(20)
  }
}

/** Runs edict with a host config of its own. */
async function withConfig(p: Project, lines: string, args: string[]): Promise<Result> {
  writeFileSync(p.client.outside("/tmp/config.toml"), `[hosts.h]\n${lines}\n`)
  return p.edict(["--config", "/tmp/config.toml", ...args])
}

const result = (p: Project): string => readlinkSync(p.file("result"))

for (const nix of VERSIONS) {
  describe.skipIf(!available.get(nix))(`Nix ${nix}, as root`, () => {
    let p: Project

    beforeAll(async () => {
      p = await project({ host: { nix, ...HIDE, ...VERBOSE }, client: { nix, ...HIDE }, flake: FLAKE })
      await wrap(p.host, "nix-store")
    })

    afterAll(() => p[Symbol.asyncDispose]())

    beforeEach(async () => {
      await p.host.sh(": >/tmp/calls")
      await p.sh("rm -f result*")
    })

    test("sessions and requests do not grow with the closure", async () => {
      expect(await p.edict(["h", "nix-build", "-A", "chain"])).toMatchObject({ code: 0 }) // the tree is there now
      await p.host.sh(": >/tmp/calls")
      const count = async (args: string[]) => {
        const before = sessions(p.host)
        const run = await p.edict(["-vv", "h", "nix-build", ...args])
        expect(run).toMatchObject({ code: 0 })
        const requests = run.stderr.split("\n").filter((line) => line.startsWith("edict: > "))
        return { sessions: sessions(p.host) - before, requests: requests.length }
      }
      const one = await count(["-A", "one"])
      expect(exported(p.host)).toHaveLength(1)
      await p.host.sh(": >/tmp/calls")
      const wide = await count(["-A", "wide"])
      expect(exported(p.host)).toHaveLength(301)
      expect(calls(p.host, "--export")).toHaveLength(1)
      expect(await invalid(p.client, result(p))).toBe("")
      expect(wide).toEqual(one)
      expect(one.sessions).toBe(3) // agent, command, stream
    })

    test("only what is missing here is streamed", async () => {
      const build = ["h", "nix-build", "--argstr", "salt", "missing", "-A", "chain"]
      expect(await p.edict(build)).toMatchObject({ code: 0 })
      const { stdout } = await p.sh("nix-store -qR result")
      const closure = stdout.trim().split("\n")
      expect(closure).toHaveLength(10)
      const middle = closure.find((path) => path.endsWith("-chain-4"))
      await p.sh(`rm result && nix-store --realise ${middle} --add-root keep --indirect && nix-store --gc`)
      await p.host.sh(": >/tmp/calls")
      expect(await p.edict(build)).toMatchObject({ code: 0 })
      expect(
        exported(p.host)
          .map((path) => path.replace(/.*-chain-/, ""))
          .sort(),
      ).toEqual([..."56789"])
      expect(await invalid(p.client, result(p))).toBe("")
    })

    test("nothing is streamed when all of it is here", async () => {
      const build = ["h", "nix-build", "--argstr", "salt", "here", "-A", "chain"]
      expect(await p.edict(build)).toMatchObject({ code: 0 })
      expect(calls(p.host, "--export")).toHaveLength(1)
      await p.sh("mv result kept")
      expect(await p.edict(build)).toMatchObject({ code: 0 })
      expect(calls(p.host, "--export")).toHaveLength(1)
      expect(result(p)).toBe(readlinkSync(p.file("kept")))
    })

    test("a large path comes as a stream of its own, after what it refers to and before what refers to it", async () => {
      const build = ["h", "nix-build", "--arg", "bytes", LARGE, "-A", "top"]
      expect(await p.edict(build)).toMatchObject({ code: 0 })
      expect(calls(p.host, "--export").map((words) => words.filter(isPath).length)).toEqual([10, 1])
      expect(calls(p.host, "--dump").map((words) => words.filter(isPath).length)).toEqual([1])
      expect(await invalid(p.client, result(p))).toBe("")
      const facts = "cd /; nix-store --dump-db $(nix-store -qR"
      const heavy = `$(nix-store -qR ${result(p)} | grep -- -heavy)`
      const known = await p.client.sh(`${facts} ${heavy})`)
      expect(known.stdout).toBe((await p.host.sh(`${facts} ${heavy})`)).stdout)
      expect(known.stdout).toMatch(/-heavy\.drv\n1\n/)
      expect((await p.client.sh("nix-store --verify --check-contents")).code).toBe(0)
      expect((await p.client.sh("ls -d /tmp/edict-nar-*")).code).not.toBe(0)
    })

    test("a link to a derivation comes as one, and nothing is built here", async () => {
      const run = await p.edict(["h", "nix-instantiate", "-A", "one", "--add-root", "one.drv", "--indirect"])
      expect(run).toMatchObject({ code: 0 })
      const target = readlinkSync(p.file("one.drv"))
      expect(target).toEndWith("-one.drv")
      expect(run.stderr).not.toContain("building")
      expect((await p.sh("nix-store --gc")).code).toBe(0)
      expect(await invalid(p.client, target)).toBe("")
    })

    test("signed paths only, if the config says so: unsigned ones stay there, signed ones come", async () => {
      const line = "require-signatures = true"
      const build = ["h", "nix-build", "-A", "wide"]
      const refused = await withConfig(p, line, [...build, "--argstr", "salt", "unsigned"])
      expect(refused.code).toBe(254)
      expect(ownLines(refused).join("\n")).toMatch(
        /^edict: the store here takes only signed paths from this host \(require-signatures\), and 1 of 301 have no signature by a key that is trusted here, e\.g\. \S+-wide; try: /,
      )
      expect(calls(p.host, "--export")).toEqual([])
      expect(existsSync(p.file("result"))).toBeFalse()

      const key = await makeKey(p.host, "signer-1")
      await p.client.sh(`echo "trusted-public-keys = ${key}" >>/etc/nix/nix.conf`)
      const signed = await withConfig(p, line, [...build, "--argstr", "salt", "signed"])
      expect({ ...signed, stderr: ownLines(signed).join("\n") }).toMatchObject({
        code: 0,
        stderr: `edict: result -> ${result(p)}`,
      })
      expect(await invalid(p.client, result(p))).toBe("")
      expect(calls(p.host, "--export")).toEqual([])
    })
  })
}

/** A signing key that the machine's Nix uses from now on; answers the public key. */
async function makeKey(machine: Host, name: string): Promise<string> {
  const { stdout } = await machine.sh(
    `cd /etc/nix && rm -f key key.pub && nix-store --generate-binary-cache-key ${name} key key.pub &&
    sed -i /secret-key-files/d nix.conf && echo "secret-key-files = /etc/nix/key" >>nix.conf && cat key.pub`,
  )
  return stdout.trim()
}

// ── A user without the rights of root, and the daemon ───

const USER = 4711
const USER_HOME = "/tmp/u"

/** The client's user `u`, with the project in USER_HOME/p, and the nix-daemon of the client. */
class User {
  private daemon: Running | undefined
  private original: string

  constructor(readonly p: Project) {
    this.original = readFileSync(p.client.outside("/etc/nix/nix.conf"), "utf8")
  }

  async setUp(): Promise<void> {
    const { code, stderr } = await this.p.client.sh(`set -e
      echo 'u:x:${USER}:${USER}::${USER_HOME}:/bin/bash' >>/etc/passwd
      echo 'u:x:${USER}:' >>/etc/group
      mkdir ${USER_HOME}
      cp -r /root/.ssh /root/.gitconfig /root/p ${USER_HOME}
      sed -i 's,/root/,${USER_HOME}/,' ${USER_HOME}/.ssh/config
      nix-store --version >/dev/null
      mkdir -p /nix/var/nix/profiles/per-user /nix/var/nix/gcroots/per-user
      chmod 1777 /nix/var/nix/profiles/per-user /nix/var/nix/gcroots/per-user
      chown -R ${USER}:${USER} ${USER_HOME}`)
    if (code !== 0) throw new Error(stderr)
  }

  /** Starts the daemon anew, with these further lines in nix.conf. */
  async configure(lines: string[]): Promise<void> {
    await this.stop()
    writeFileSync(this.p.client.outside("/etc/nix/nix.conf"), [this.original, ...lines, ""].join("\n"))
    await this.p.client.sh("rm -f /nix/var/nix/daemon-socket/socket")
    this.daemon = this.p.client.spawn(["nix-daemon"], { timeout: 600_000 })
    const probe = `[ -S /nix/var/nix/daemon-socket/socket ] && nix-store --check-validity --print-invalid /nix/store/${"0".repeat(32)}-x`
    await eventually("nix-daemon", async () => (await this.sh(probe)).code === 0)
    // It serves somebody else, so the paths come through it.
    expect((await this.sh("[ ! -w /nix/var/nix/db ]")).code).toBe(0)
  }

  async stop(): Promise<void> {
    await this.daemon?.kill("SIGKILL").catch(() => undefined)
    await this.daemon?.result
    this.daemon = undefined
  }

  sh(script: string): Promise<Result> {
    const user = ["setpriv", `--reuid=${USER}`, `--regid=${USER}`, "--clear-groups"]
    return this.p.client.run([...user, "/bin/sh", "-c", `edict() { '${EDICT}' "$@"; }\n${script}`], {
      cwd: `${USER_HOME}/p`,
      env: { HOME: USER_HOME, USER: "u", LOGNAME: "u" },
    })
  }

  /** Runs edict; `config` is of the host. */
  async edict(words: string, config = ""): Promise<Result> {
    writeFileSync(this.p.client.outside("/tmp/user.toml"), `[hosts.h]\n${config}\n`)
    return this.sh(`edict --config /tmp/user.toml ${words}`)
  }
}

for (const nix of VERSIONS) {
  describe.skipIf(!available.get(nix))(`Nix ${nix}, a user of the daemon`, () => {
    let p: Project, user: User

    beforeAll(async () => {
      p = await project({ host: { nix, ...HIDE, ...VERBOSE }, client: { nix, ...HIDE }, flake: FLAKE })
      user = new User(p)
      await user.setUp()
      await wrap(p.host, "nix-store")
    })

    afterAll(async () => {
      await user.stop()
      await p[Symbol.asyncDispose]()
    })

    beforeEach(async () => {
      await p.host.sh(": >/tmp/calls")
      await unwrap(p.client)
      await user.sh("rm -f result* version.txt.orig && git checkout -q .")
    })

    const linked = async (): Promise<string> => (await user.sh("readlink result")).stdout.trim()

    test("not trusted, not signed: refused before anything is sent, with the remedies; changes still come", async () => {
      await user.configure(["trusted-users = root"])
      const run = await user.edict(
        `--sync h nix shell -f ./default.nix chain -c sh -c 'nix-build -A wide --argstr salt no && echo changed >version.txt'`,
      )
      expect(run.code).toBe(254)
      const said = ownLines(run).filter((line) => !line.includes("1 file changed here: version.txt"))
      expect(said).toHaveLength(1)
      expect(said[0]).toMatch(
        /^edict: the store here takes only signed paths from this user, and 1 of 301 have no signature by a key that is trusted here, e\.g\. \/nix\/store\/\S+-wide; try: /,
      )
      for (const remedy of ["sign on h", 'import = "sudo"', "--no-link", "trusted user", "the same as root"])
        expect(said[0]).toContain(remedy)
      expect(calls(p.host, "--export")).toEqual([])
      expect(await linked()).toBe("")
      expect((await user.sh("cat version.txt")).stdout).toBe("changed\n")
    })

    test("a user's own nix.conf makes no key and no user trusted", async () => {
      const key = await makeKey(p.host, "mine-1")
      await user.configure(["trusted-users = root"])
      await user.sh(`mkdir -p ~/.config/nix && echo "extra-trusted-public-keys = ${key}
        trusted-users = u
        require-sigs = false" >~/.config/nix/nix.conf`)
      const run = await user.edict("h nix-build -A wide --argstr salt own-conf")
      await user.sh("rm ~/.config/nix/nix.conf")
      await p.host.sh("sed -i /secret-key-files/d /etc/nix/nix.conf")
      expect(run.code).toBe(254)
      expect(ownLines(run)).toHaveLength(1)
      expect(run.stderr).toContain("the store here takes only signed paths from this user")
      expect(calls(p.host, "--export")).toEqual([])
    })

    test.each([
      ["by name", "u"],
      ["by group", "@u"],
      ["all", "*"],
    ])("trusted %s: streamed", async (_, name) => {
      await user.configure([`trusted-users = root ${name}`])
      const run = await user.edict(`h nix-build -A wide --argstr salt 'trusted ${name}'`)
      expect(run).toMatchObject({ code: 0 })
      expect(exported(p.host)).toHaveLength(301)
      expect(await invalid(p.client, await linked())).toBe("")
      expect((await p.client.sh("nix-store --gc --print-roots")).stdout).toContain(`${USER_HOME}/p/result`)
    })

    test("a large path streams for a trusted user, too", async () => {
      await user.configure(["trusted-users = root u"])
      const run = await user.edict(`h nix-build -A heavy --arg bytes ${LARGE} --argstr salt large`)
      expect(run).toMatchObject({ code: 0 })
      expect(calls(p.host, "--dump")).toHaveLength(1)
      expect(await invalid(p.client, await linked())).toBe("")
    })

    test("a store that asks for no signatures: streamed", async () => {
      await user.configure(["require-sigs = false", "trusted-users = root"])
      expect(await user.edict("h nix-build -A wide --argstr salt lax")).toMatchObject({ code: 0 })
      expect(exported(p.host)).toHaveLength(301)
      expect(await invalid(p.client, await linked())).toBe("")
    })

    test("signed by a key that is trusted here: copied with signatures, linked and rooted", async () => {
      const key = await makeKey(p.host, "good-1")
      await user.configure(["trusted-users = root", `trusted-public-keys = ${key}`])
      const odd = `-o 'SetEnv=LC_A="two words"'`
      const run = await user.edict(`${odd} h nix-build -A wide --argstr salt signed --argstr long s`)
      expect({ code: run.code, said: ownLines(run) }).toEqual({
        code: 0,
        said: [`edict: result -> ${await linked()}`],
      })
      expect(calls(p.host, "--export")).toEqual([])
      expect((await p.client.sh("nix-store --gc")).code).toBe(0)
      expect(await invalid(p.client, await linked())).toBe("")
    })

    test("a key that only has the name of a trusted one: Nix's refusal in one line that names the side", async () => {
      const key = await makeKey(p.host, "twin-1")
      await makeKey(p.host, "twin-1")
      await user.configure(["trusted-users = root", `trusted-public-keys = ${key}`])
      const run = await user.edict("h nix-build -A one --argstr salt twin")
      await p.host.sh("sed -i /secret-key-files/d /etc/nix/nix.conf")
      expect(run.code).toBe(254)
      expect(ownLines(run)).toHaveLength(1)
      expect(ownLines(run)[0]).toMatch(
        /lacks a (signature|valid signature).* the store here refuses .*--no-link/,
      )
      expect(await linked()).toBe("")
    })

    test("import = \"sudo\": only the import is root's, ssh stays the user's", async () => {
      await user.configure(["trusted-users = root"])
      // Hands the import to a helper that runs as root; both note who they are.
      await p.client.sh("rm -f /tmp/sudo.in /tmp/sudo.rc && mkfifo -m 666 /tmp/sudo.in /tmp/sudo.rc")
      await wrap(
        p.client,
        "sudo",
        `echo "sudo-user $(id -u)" >>/tmp/calls; cat >/tmp/sudo.in; exit $(cat /tmp/sudo.rc)`,
      )
      await wrap(p.client, "ssh", `echo "ssh-user $(id -u)" >>/tmp/calls`)
      const helper = p.client.spawn([
        "/bin/sh",
        "-c",
        "nix-store --import </tmp/sudo.in >/dev/null; echo $? >/tmp/sudo.rc",
      ])
      const run = await user.edict("h nix-build -A wide --argstr salt sudo", `import = "sudo"`)
      await p.client.sh("rm -f /usr/local/bin/ssh")
      expect(run).toMatchObject({ code: 0 })
      expect(await helper.result).toMatchObject({ code: 0 })
      expect(exported(p.host)).toHaveLength(301)
      expect(calls(p.client, "sudo").map((words) => words.slice(1))).toEqual([
        ["/usr/bin/nix-store", "--import"],
      ])
      expect(calls(p.client, "sudo-user")).toEqual([["sudo-user", String(USER)]])
      expect(new Set(calls(p.client, "ssh-user").map(String))).toEqual(new Set([`ssh-user,${USER}`]))
      expect(await invalid(p.client, await linked())).toBe("")
    })

    test("store paths that its user there may not add: refused with one line that names that side", async () => {
      await user.configure(["trusted-users = root u"])
      // Over there, whoever imports is refused.
      await wrap(
        p.host,
        "nix-store",
        `case $* in *--import*)
        cat >/dev/null; echo "error: cannot add path '/nix/store/x' because it lacks a signature by a trusted key" >&2; exit 1 ;; esac`,
      )
      await p.client.sh(`cd /root/p && nix-build -A one --argstr salt up -o ${USER_HOME}/p/up`)
      const run = await user.edict("h nix path-info ./up")
      await wrap(p.host, "nix-store")
      expect(run.code).toBe(254)
      expect(ownLines(run)).toHaveLength(1)
      expect(ownLines(run)[0]).toMatch(
        /the store on h takes only signed paths .*-one; try: .*trusted-public-keys on h.* the same as root there/,
      )
    })
  })
}

// ── The stream on its way, with Nix 2.8 ───

describe("compression", () => {
  /** What compressed and what expanded the stream, in a run of its own. */
  async function packers(p: Project, line: string): Promise<string[]> {
    for (const machine of [p.host, p.client])
      for (const program of ["zstd", "gzip"])
        if ((await machine.sh(`[ -e /usr/bin/${program} ]`)).code === 0) await wrap(machine, program)
    await Promise.all([p.host.sh(": >/tmp/calls"), p.client.sh(": >/tmp/calls")])
    const run = await withConfig(p, line, ["h", "nix-build", "-A", "heavy", "--arg", "bytes", "400000"])
    expect(run).toMatchObject({ code: 0 })
    expect(await invalid(p.client, result(p))).toBe("")
    const used = (machine: Host | Client, side: string, option: string) =>
      calls(machine, option)
        .filter(([program]) => program === "zstd" || program === "gzip")
        .map(([program]) => `${program} ${side}`)
    return [...used(p.host, "there", "-1"), ...used(p.client, "here", "-d")]
  }

  type Case = [
    line: string,
    hiddenThere: string,
    hiddenHere: string,
    delay: number | undefined,
    used: string[],
  ]

  test.each<Case>([
    ["compress = true", "", "", undefined, ["zstd there", "zstd here"]],
    ["compress = true", "zstd", "", undefined, ["gzip there", "gzip here"]],
    ["compress = true", "", "zstd", undefined, ["gzip there", "gzip here"]],
    ["compress = true", "zstd", "gzip", undefined, []],
    ["compress = false", "", "", 20, []],
    [`compress = "auto"`, "", "", 20, ["zstd there", "zstd here"]],
    [`compress = "auto"`, "zstd", "", 20, []],
    [`compress = "auto"`, "", "", undefined, []],
  ])("%s, without %p there, without %p here, delay %p: %j", async (line, there, here, delay, used) => {
    await using p = await project({
      host: { hide: ["fish", there], ...(delay === undefined ? {} : { delay }) },
      client: { hide: ["fish", here] },
      flake: FLAKE,
    })
    expect(await packers(p, line)).toEqual(used)
  })
})

describe("the stream", () => {
  let p: Project

  beforeAll(async () => {
    p = await project({ host: { ...HIDE, ...VERBOSE }, client: HIDE, flake: FLAKE })
  })

  afterAll(() => p[Symbol.asyncDispose]())

  beforeEach(async () => {
    await Promise.all([unwrap(p.host), unwrap(p.client)])
    await p.sh("rm -rf result* keep* x /root/.gate; git checkout -q .")
    await p.client.sh("nix-store --gc")
  })

  /** A wrapped nix-store waits at this option until the gate is opened. */
  const GATE = (option: string) =>
    `case $* in *${option}*) touch /root/at-gate; while [ ! -e /root/gate ]; do sleep 0.05; done ;; esac`
  const atGate = (machine: Host | Client) => () => existsSync(machine.outside("/root/at-gate"))
  const openGate = (machine: Host | Client) => writeFileSync(machine.outside("/root/gate"), "")
  const noGate = (machine: Host | Client) => machine.sh("rm -f /root/gate /root/at-gate")

  /** Sends this many bytes of the export, then nothing, without an end. */
  const STALL = (bytes: number) =>
    `case $* in *--export*) "$real" "$@" | { head -c ${bytes}; touch /root/stalled; while head -c 1; do sleep 0.1; done; }; exit 1 ;; esac`

  test("closures that no command line could name: down, and up again", async () => {
    await wrap(p.host, "nix-store")
    const wide = ["--argstr", "long", "l".repeat(180), "--arg", "n", "1000", "-A", "wide"]
    expect(await p.edict(["h", "nix-build", ...wide])).toMatchObject({ code: 0 })
    expect(exported(p.host).join(" ").length).toBeGreaterThan(200_000)
    expect(await invalid(p.client, result(p))).toBe("")

    expect(await p.host.sh("rm -rf /root/.cache/edict; nix-store --gc")).toMatchObject({ code: 0 })
    const path = result(p)
    expect(existsSync(p.host.outside(path))).toBeFalse()
    expect(await p.edict(["h", "nix", "path-info", "./result"])).toMatchObject({
      code: 0,
      stdout: `${path}\n`,
    })
    expect(await invalid(p.host, path)).toBe("")
  }, 120_000)

  test("over there the result has a root until it has one here", async () => {
    await wrap(p.client, "nix-store", GATE("--import"))
    await wrap(p.host, "nix-store", `case $* in *--export*) "$real" --gc >/root/gc.log 2>&1 ;; esac`)
    const run = p.spawn(["h", "nix-build", "-A", "chain", "--argstr", "salt", "rooted"])
    await eventually("import", atGate(p.client))
    const there = (await p.host.sh("nix-store --gc; readlink /root/.cache/edict/*/tree/root/p/result")).stdout
    expect(await invalid(p.host, there.trim().split("\n").at(-1)!)).toBe("")
    // Nothing leads to what is not there yet.
    expect(existsSync(p.file("result"))).toBeFalse()
    expect(() => lstatSync(p.file("result"))).toThrow()
    openGate(p.client)
    run.end()
    expect(await run.result).toMatchObject({ code: 0 })
    await noGate(p.client)
    expect((await p.host.sh("cat /root/gc.log")).stdout).toContain("store paths deleted")
    expect(await invalid(p.client, result(p))).toBe("")
  })

  test("garbage collection here, between arrival and link: it comes once more", async () => {
    const once = `case $* in *--realise*) [ -e /root/collected ] || { touch /root/collected; "$real" --gc >/dev/null 2>&1; } ;; esac`
    await wrap(p.client, "nix-store", once)
    const run = await p.edict(["h", "nix-build", "-A", "chain", "--argstr", "salt", "between"])
    await p.client.sh("rm /root/collected")
    expect(run).toMatchObject({ code: 0 })
    expect(calls(p.client, "--import")).toHaveLength(2)
    expect(await invalid(p.client, result(p))).toBe("")
  })

  test("garbage collection here takes what was found to be here already: it comes, too", async () => {
    const build = ["h", "nix-build", "-A", "chain", "--argstr", "salt", "taken"]
    expect(await p.edict(build)).toMatchObject({ code: 0 })
    const { stdout } = await p.sh("nix-store -qR result | grep chain-8; rm result")
    await p.sh(`nix-store --realise ${stdout.trim()} --add-root keep --indirect; nix-store --gc`)
    const once = `case $* in *--import*) [ -e /root/collected ] || { touch /root/collected; rm /root/p/keep; "$real" --gc >/dev/null 2>&1; } ;; esac`
    await wrap(p.client, "nix-store", once)
    const run = await p.edict(build)
    await p.client.sh("rm /root/collected")
    expect(run).toMatchObject({ code: 0 })
    expect(calls(p.client, "--import")).toHaveLength(2)
    expect(await invalid(p.client, result(p))).toBe("")
  })

  /** Breaks a transfer that has come as far as the end of `chain`; it must leave a sound store, and the next run a result. */
  async function broken(salt: string, breakIt: (run: Running) => Promise<unknown>): Promise<Result> {
    const build = ["h", "nix-build", "-A", "heavy", "--arg", "bytes", "3000000", "--argstr", "salt", salt]
    await p.host.sh("rm -f /root/stalled")
    await wrap(p.host, "nix-store", STALL(1_000_000))
    const last = await p.sh(`nix-store -q $(nix-instantiate -A chain --argstr salt ${salt})`)
    const run = p.spawn(build)
    run.end()
    await eventually("the stream", () => existsSync(p.host.outside("/root/stalled")))
    await eventually("ten paths", async () => {
      return (await p.client.sh(`nix-store --check-validity ${last.stdout.trim()}`)).code === 0
    })
    await breakIt(run)
    const first = await run.result
    expect(exported(p.host)).toHaveLength(11)
    expect(() => lstatSync(p.file("result"))).toThrow()
    await eventually(
      "nothing runs on",
      async () => !(await p.client.processes()).some((line) => line.includes("--import")),
    )
    expect(await verify(p.client)).toBe("0 ")

    await wrap(p.host, "nix-store")
    await p.host.sh(": >/tmp/calls")
    expect(await p.edict(build)).toMatchObject({ code: 0 })
    expect(exported(p.host).map((path) => path.slice(44))).toEqual(["heavy"])
    expect(await invalid(p.client, result(p))).toBe("")
    return first
  }

  const killer = (machine: Client | Host, pattern: string, signal: string) => async () => {
    const victims = (await machine.processes()).filter((line) => line.includes(pattern))
    expect(victims).not.toEqual([])
    await machine.sh(`kill -${signal} ${victims.map((line) => line.split(" ")[0]).join(" ")}`)
  }

  test("cut by the network: one line, and the next run goes on", async () => {
    const first = await broken("cut", () => p.host.dropConnections())
    expect(first.code).toBe(255)
    expect(ownLines(first)).toHaveLength(1)
  })

  test("the import is killed: one line, and the next run goes on", async () => {
    const first = await broken("import", killer(p.client, "nix-store --import", "KILL"))
    expect(first.code).toBe(254)
    expect(ownLines(first)).toHaveLength(1)
    expect(ownLines(first)[0]).toContain("retrieval of the result failed")
  })

  test("the export is killed: one line, and the next run goes on", async () => {
    const first = await broken("export", killer(p.host, "nix-store --export", "KILL"))
    expect(first.code).toBe(254)
    expect(ownLines(first)).toHaveLength(1)
  })

  test("SIGTERM: 143, nothing runs on here or there, and the next run goes on", async () => {
    const first = await broken("term", async (run) => {
      await run.kill("SIGTERM")
      await run.result
      const remains = async () => (await p.host.processes()).filter((line) => /--export/.test(line))
      await eventually("no export", async () => (await remains()).length === 0)
    })
    expect(first.code).toBe(143)
  })

  test("a large path that arrives as something else is refused, and leaves nothing", async () => {
    const build = ["h", "nix-build", "-A", "heavy", "--arg", "bytes", LARGE, "--argstr", "salt", "other"]
    await wrap(p.host, "nix-store", `case $* in *--dump' '/*) "$real" "$@" | tr A B; exit ;; esac`)
    const run = await p.edict(build)
    expect(run.code).toBe(254)
    expect(ownLines(run)).toHaveLength(1)
    expect(ownLines(run)[0]).toMatch(/retrieval of the result failed.*hash mismatch/)
    expect(() => lstatSync(p.file("result"))).toThrow()
    expect(await verify(p.client)).toBe("0 ")
    await unwrap(p.host)
    expect(await p.edict(build)).toMatchObject({ code: 0 })
    expect(await invalid(p.client, result(p))).toBe("")
  })

  test("a full disk here: said in one line; with more space it comes", async () => {
    await using small = await project({ flake: FLAKE })
    await small.client.sh("mount -t tmpfs -o size=4m tmpfs /nix && nix-store --version && nix-store --gc")
    const build = ["h", "nix-build", "-A", "heavy", "--arg", "bytes", "12000000"]
    const run = await small.edict(build)
    expect(run.code).toBe(254)
    expect(ownLines(run)).toHaveLength(1)
    expect(ownLines(run)[0]).toMatch(/No space left on device.*free some space/)
    expect(() => lstatSync(small.file("result"))).toThrow()
    await small.client.sh("mount -o remount,size=64m /nix")
    expect(await verify(small.client)).toBe("0 ")
    expect(await small.edict(build)).toMatchObject({ code: 0 })
    expect(await invalid(small.client, result(small))).toBe("")
  })

  test("substitute = true: what the substituters here have comes from them, the rest from the host", async () => {
    await wrap(p.host, "nix-store")
    const build = ["nix-build", "-A", "chain", "--argstr", "salt", "cache"]
    expect(await p.edict(["h", ...build])).toMatchObject({ code: 0 })
    // A cache with the first half of the closure.
    const path = result(p)
    const made = await p.sh(`half=$(nix-store -qR ${path} | grep chain-4) && rm result &&
      nix --extra-experimental-features nix-command copy --to file:///tmp/cache $half && nix-store --gc &&
      cp /etc/nix/nix.conf /tmp/nix.conf && sed -i '/^substituters/d' /etc/nix/nix.conf &&
      echo 'substituters = file:///tmp/cache?trusted=1' >>/etc/nix/nix.conf`)
    expect(made).toMatchObject({ code: 0 })
    await p.host.sh(": >/tmp/calls")
    const run = await withConfig(p, "substitute = true", ["h", ...build])
    await p.sh("cp /tmp/nix.conf /etc/nix/nix.conf")
    expect(run).toMatchObject({ code: 0 })
    expect(
      exported(p.host)
        .map((name) => name.replace(/.*-chain-/, ""))
        .sort(),
    ).toEqual([..."56789"])
    expect(await invalid(p.client, result(p))).toBe("")
    expect(result(p)).toBe(path)
  })

  test("a store link as an argument: its closure goes there once", async () => {
    await wrap(p.host, "nix-store")
    const made = await p.sh("nix-build -A wide --argstr salt up -o x")
    expect(made).toMatchObject({ code: 0 })
    const path = readlinkSync(p.file("x"))
    expect(existsSync(p.host.outside(path))).toBeFalse()
    const before = sessions(p.host)
    const first = await p.edict(["h", "nix", "shell", "./x", "-c", "cat", path])
    expect(first).toMatchObject({ code: 0 })
    expect(first.stdout.split("\n")).toHaveLength(300)
    expect(sessions(p.host) - before).toBe(3)
    expect(await invalid(p.host, path)).toBe("")
    expect(calls(p.host, "--import")).toHaveLength(1)
    const again = await p.edict(["h", "nix", "path-info", "./x"])
    expect(again).toMatchObject({ code: 0, stdout: `${path}\n` })
    expect(calls(p.host, "--import")).toHaveLength(1)
  })

  test("a path that lies there but is not valid goes there again", async () => {
    await p.sh("nix-build -A chain --argstr salt half -o x")
    const path = readlinkSync(p.file("x"))
    await p.host.sh(`mkdir ${path}`)
    expect(await p.edict(["h", "nix", "path-info", "./x"])).toMatchObject({ code: 0, stdout: `${path}\n` })
    expect(await invalid(p.host, path)).toBe("")
  })

  // ── Progress ───

  /** Lets the export take some seconds. */
  const SLOW = `case $* in *--export*) "$real" "$@" | { for _ in 1 2 3 4 5 6 7 8 9 10; do head -c 400000; sleep 0.25; done; cat; }; exit ;; esac`
  const PROGRESS = /edict: \d+ of 11 store paths, \d+\.\d of 3\.\d MiB, \d+\.\d MiB\/s/
  const heavy = (salt: string) => [
    "h",
    "nix-build",
    "-A",
    "heavy",
    "--arg",
    "bytes",
    "4000000",
    "--argstr",
    "salt",
    salt,
  ]

  test("on a terminal a slow closure shows its progress in one line, and takes it away", async () => {
    await wrap(p.host, "nix-store", SLOW)
    const run = p.spawn(heavy("tty"), { tty: true })
    const { code, stdout } = await run.result
    expect(code).toBe(0)
    const shown = stdout.match(/\r\x1b\[Kedict: [^\r\n]* MiB[^\r\n]*/g) ?? []
    expect(shown.length).toBeGreaterThan(0)
    for (const line of shown) expect(line).toMatch(PROGRESS)
    expect(shown.some((line) => /10 of 11 store paths, .*, \d+ s left$/.test(line))).toBeTrue()
    expect(onScreen(stdout)).not.toMatch(/store paths|copied|records/)
    expect(onScreen(stdout)).toContain("edict: result -> ")
  })

  test.each<[string, string[], { tty?: boolean; env?: Record<string, string> }]>([
    ["without a terminal", [], {}],
    ["with -q", ["-q"], { tty: true }],
    ["on a dumb terminal", [], { tty: true, env: { TERM: "dumb" } }],
  ])("%s there is none", async (name, options, how) => {
    await wrap(p.host, "nix-store", SLOW)
    const run = p.spawn([...options, ...heavy(name)], how)
    run.end()
    const { code, stdout, stderr } = await run.result
    expect(code).toBe(0)
    expect(stdout + stderr).not.toMatch(/MiB|store paths|copied|\x1b\[K/)
  })

  test("the same for files", async () => {
    await wrap(p.client, "rsync", `exec "$real" --bwlimit=1000 "$@"`)
    await p.sh("head -c 3000000 /dev/urandom >x; git add x")
    const run = p.spawn(["h", "nix", "eval", ".#lib.answer"], { tty: true })
    const { code, stdout } = await run.result
    await p.sh("rm /usr/local/bin/rsync; git rm -qf x")
    expect(code).toBe(0)
    expect(stdout).toMatch(/\r\x1b\[Kedict: \d+ of \d+ files, \d\.\d of \d\.\d MiB, \d+\.\d MiB\/s/)
    expect(onScreen(stdout)).not.toMatch(/MiB|%/)
    expect(onScreen(stdout)).toContain("42")
  })

  test("the same for store paths that go up", async () => {
    await wrap(p.client, "nix-store", SLOW)
    await p.sh("nix-build -A heavy --arg bytes 4000000 --argstr salt progress-up -o x")
    const run = p.spawn(["h", "nix", "path-info", "./x"], { tty: true })
    const { code, stdout } = await run.result
    expect(code).toBe(0)
    expect(stdout).toMatch(PROGRESS)
    expect(onScreen(stdout)).not.toMatch(/store paths|copied|records/)
    expect(onScreen(stdout)).toContain(`${readlinkSync(p.file("x"))}\n`)
  })
})

/** What a terminal shows in the end of what was written to it: carriage returns and erased lines heeded. */
function onScreen(written: string): string {
  const lines = written.replaceAll("\r\n", "\n").split("\n")
  return lines.map((line) => line.split("\r\x1b[K").at(-1)).join("\n")
}

describe("progressLine", () => {
  const MIB = 2 ** 20
  type At = Parameters<typeof progressLine>[1]

  test.each<[At, string]>([
    [
      { sizes: [MIB, MIB, 8 * MIB], total: 10 * MIB, done: 2.5 * MIB, seconds: 5 },
      "edict: 2 of 3 store paths, 2.5 of 10.0 MiB, 0.5 MiB/s, 15 s left",
    ],
    [
      { sizes: [MIB, MIB], total: 2 * MIB, done: 2 * MIB, seconds: 2 },
      "edict: 2 of 2 store paths, 2.0 of 2.0 MiB, 1.0 MiB/s",
    ],
    [
      { sizes: [MIB], total: MIB, done: 0, seconds: 1 },
      "edict: 0 of 1 store paths, 0.0 of 1.0 MiB, 0.0 MiB/s",
    ],
    // The stream is a little longer than the paths in it.
    [
      { sizes: [MIB], total: MIB, done: 1.5 * MIB, seconds: 1 },
      "edict: 1 of 1 store paths, 1.0 of 1.0 MiB, 1.5 MiB/s",
    ],
  ])("%j", (at, line) => {
    expect(progressLine("store paths", at)).toBe(line)
  })
})

describe("unsignedPaths", () => {
  const keys = new Set(["cache.nixos.org-1", "mine-1"])
  const path = (name: string) => `/nix/store/${"0".repeat(32)}-${name}`

  test.each<[string, string, string[]]>([
    ["built there (2.8)", `${path("a")}\t  ultimate`, [path("a")]],
    ["no word at all", path("a"), [path("a")]],
    ["signed by a trusted key", `${path("a")}\tcache.nixos.org-1:c2ln`, []],
    ["built there and signed (2.26)", `${path("a")}  \tultimate mine-1:c2ln`, []],
    ["signed by another key", `${path("a")}\tother-1:c2ln`, [path("a")]],
    ["signed by both", `${path("a")}\tother-1:c2ln mine-1:c2ln`, []],
    ["a key whose name begins the same", `${path("a")}\tmine-10:c2ln`, [path("a")]],
    ["addressed by content", `${path("a")}\tca:text:sha256:0abc`, []],
    ["a name like a key's", `${path("mine-1")}\tultimate`, [path("mine-1")]],
  ])("%s", (_, line, expected) => {
    expect(unsignedPaths([line], keys)).toEqual(expected)
  })

  test("several lines, padded as Nix 2.34 does", () => {
    const answer = [`${path("a")}   \tultimate`, `${path("long-name")}\tca:fixed:r:sha256:0abc`, ""]
    expect(unsignedPaths(answer.slice(0, 2), keys)).toEqual([path("a")])
  })
})

describe("batchesOf", () => {
  const [small, large] = [2 ** 10, 2 ** 27]
  const path = (name: string, size: number) => ({ path: `/nix/store/${"a".repeat(32)}-${name}`, size })

  test.each<[string, number[], string[]]>([
    ["nothing", [], []],
    ["small ones together", [small, small, small], ["export 3"]],
    ["sizes that nobody knows together", [0, 0], ["export 2"]],
    ["a large one alone", [large], ["nar 1"]],
    [
      "in order",
      [small, small, large, small, large, large],
      ["export 2", "nar 1", "export 1", "nar 1", "nar 1"],
    ],
  ])("%s", (_, sizes, expected) => {
    const paths = sizes.map((size, at) => path(String(at), size))
    const batches = batchesOf(paths)
    expect(batches.map((batch) => `${batch.carrier} ${batch.paths.length}`)).toEqual(expected)
    expect(batches.flatMap((batch) => batch.paths)).toEqual(paths)
  })

  test("a large derivation goes with the others", () => {
    expect(batchesOf([path("x.drv", large)])).toMatchObject([{ carrier: "export" }])
  })
})

describe("parseRegistrations", () => {
  const [a, b] = [`/nix/store/${"a".repeat(32)}-a`, `/nix/store/${"b".repeat(32)}-b`]
  const hash = "0f".repeat(32)

  test("with and without a deriver and references", () => {
    const answer = `${a}\n${hash}\n120\n${b}.drv\n2\n${a}\n${b}\n${b}\n${hash}\n7\n\n0\n`
    const infos = parseRegistrations(answer)
    expect([...infos.keys()]).toEqual([a, b])
    expect(infos.get(a)).toBe(
      `StorePath: ${a}\nURL: nar/stream.nar\nCompression: none\nNarHash: sha256:${hash}\nNarSize: 120\nReferences: ${a.slice(11)} ${b.slice(11)}\nDeriver: ${b.slice(11)}.drv\n`,
    )
    expect(infos.get(b)).toMatch(/NarSize: 7\nReferences: \n$/)
  })

  test.each([
    ["a path elsewhere", `/etc/passwd\n${hash}\n1\n\n0\n`],
    ["another hash", `${a}\nsha256:${hash}\n1\n\n0\n`],
    ["no size", `${a}\n${hash}\nmany\n\n0\n`],
    ["a deriver with a line of its own", `${a}\n${hash}\n1\nSig: x\n0\n`],
    ["references that end early", `${a}\n${hash}\n1\n\n3\n${b}\n`],
    ["no number of references", `${a}\n${hash}\n1\n\n-1\n${b}\n`],
  ])("%s ends the list", (_, answer) => {
    expect([...parseRegistrations(answer).keys()]).toEqual([])
  })
})
