// How store paths travel: what is streamed, who may take it, and what a broken transfer leaves.
import { afterAll, beforeAll, beforeEach, describe, expect, test } from "bun:test"
import { existsSync, lstatSync, readFileSync, readlinkSync, writeFileSync } from "node:fs"
import { progressLine, unsignedPaths } from "../edict"
import { writeFiles, type FlakeOptions } from "./lab/flake"
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
}
`
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

/** The store paths that the host was asked to export, of all calls together. */
const exported = (host: Host): string[] =>
  calls(host, "--export").flatMap((words) => words.filter((word) => word.startsWith("/nix/store/")))

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
  const usual = /^(reading the Nix store|checking path existence|checking hashes|checking link|checking store).*\n/gm
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
      expect(exported(p.host).map((path) => path.replace(/.*-chain-/, "")).sort()).toEqual([..."56789"])
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
    await eventually("nix-daemon", async () => (await this.sh("nix-store --query --hash /nix/store/x 2>&1 | grep -c 'Connection refused\\|cannot connect\\|Permission'")).stdout === "0\n")
    // It serves somebody else, so the paths come through it.
    expect((await this.sh("[ -S /nix/var/nix/daemon-socket/socket ] && [ ! -w /nix/var/nix/db ]")).code).toBe(0)
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
        `h nix shell -f ./default.nix chain -c sh -c 'nix-build -A wide --argstr salt no && echo changed >version.txt'`,
      )
      expect(run.code).toBe(254)
      const said = ownLines(run)
      expect(said[0]).toMatch(
        /^edict: the store here takes only signed paths from this user, and 1 of 301 have no signature by a key that is trusted here, e\.g\. \/nix\/store\/\S+-wide; try: /,
      )
      for (const remedy of ["sign on h", 'import = "sudo"', "--no-link", "trusted user", "the same as root"])
        expect(said[0]).toContain(remedy)
      expect(said.filter((line) => line.includes("sign"))).toHaveLength(1)
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

    test.each([["by name", "u"], ["by group", "@u"], ["all", "*"]])("trusted %s: streamed", async (_, name) => {
      await user.configure([`trusted-users = root ${name}`])
      const run = await user.edict(`h nix-build -A wide --argstr salt 'trusted ${name}'`)
      expect(run).toMatchObject({ code: 0 })
      expect(exported(p.host)).toHaveLength(301)
      expect(await invalid(p.client, await linked())).toBe("")
      expect((await p.client.sh("nix-store --gc --print-roots")).stdout).toContain(`${USER_HOME}/p/result`)
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
      const run = await user.edict("h nix-build -A wide --argstr salt signed --argstr long s")
      expect({ code: run.code, said: ownLines(run) }).toEqual({ code: 0, said: [`edict: result -> ${await linked()}`] })
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
      expect(ownLines(run)[0]).toMatch(/lacks a (signature|valid signature).* the store here refuses .*--no-link/)
      expect(await linked()).toBe("")
    })

    test('import = "sudo": only the import is root\'s, ssh stays the user\'s', async () => {
      await user.configure(["trusted-users = root"])
      // Hands the import to a helper that runs as root; both note who they are.
      await p.client.sh("rm -f /tmp/sudo.in /tmp/sudo.rc && mkfifo -m 666 /tmp/sudo.in /tmp/sudo.rc")
      await wrap(p.client, "sudo", `echo "sudo-user $(id -u)" >>/tmp/calls; cat >/tmp/sudo.in; exit $(cat /tmp/sudo.rc)`)
      await wrap(p.client, "ssh", `echo "ssh-user $(id -u)" >>/tmp/calls`)
      const helper = p.client.spawn(["/bin/sh", "-c", "nix-store --import </tmp/sudo.in >/dev/null; echo $? >/tmp/sudo.rc"])
      const run = await user.edict("h nix-build -A wide --argstr salt sudo", `import = "sudo"`)
      await p.client.sh("rm -f /usr/local/bin/ssh")
      expect(run).toMatchObject({ code: 0 })
      expect(await helper.result).toMatchObject({ code: 0 })
      expect(exported(p.host)).toHaveLength(301)
      expect(calls(p.client, "sudo").map((words) => words.slice(1))).toEqual([["/usr/bin/nix-store", "--import"]])
      expect(calls(p.client, "sudo-user")).toEqual([["sudo-user", String(USER)]])
      expect(new Set(calls(p.client, "ssh-user").map(String))).toEqual(new Set([`ssh-user,${USER}`]))
      expect(await invalid(p.client, await linked())).toBe("")
    })

    test("store paths that its user there may not add: refused with one line that names that side", async () => {
      await user.configure(["trusted-users = root u"])
      // Over there, whoever imports is refused.
      await wrap(p.host, "nix-store", `case $* in *--import*)
        cat >/dev/null; echo "error: cannot add path '/nix/store/x' because it lacks a signature by a trusted key" >&2; exit 1 ;; esac`)
      await p.client.sh(`cd /root/p && nix-build -A one --argstr salt up -o ${USER_HOME}/p/up`)
      const run = await user.edict("h nix path-info ./up")
      await wrap(p.host, "nix-store")
      expect(run.code).toBe(254)
      expect(ownLines(run)).toHaveLength(1)
      expect(ownLines(run)[0]).toMatch(/the store on h takes only signed paths .*-one; try: .*trusted-public-keys on h.* the same as root there/)
    })
  })
}
