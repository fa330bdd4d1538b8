/**
 * The test lab: several "machines" on this one, each with its own /nix, /root, /tmp, /srv, /etc and processes, and
 * a real sshd. See namespace.sh for what a machine is made of. Needs root and the programs of setup.sh.
 *
 *     await using h1 = await startHost({ name: "h1" })
 *     await using client = await startClient({ hosts: [h1] })
 *     await client.sh("ssh h1 nix --version")
 *
 * A machine ends with stop(), at the end of an `await using` scope, or with the test process, however that ends.
 */

import {
  accessSync,
  closeSync,
  constants as open,
  copyFileSync,
  mkdtempSync,
  openSync,
  readFileSync,
  statfsSync,
} from "node:fs"
import { appendFile, writeFile } from "node:fs/promises"
import { createServer } from "node:net"
import { constants, tmpdir } from "node:os"
import { join, resolve } from "node:path"
import { versionDirectory, type NixVersion, type RsyncVersion, type SshVersion } from "./versions"

export {
  nixAvailable,
  versionAvailable,
  type NixVersion,
  type RsyncVersion,
  type SshVersion,
} from "./versions"

/**
 * Where machines lie: in memory where there is room, since ext4 needs half a millisecond to create a file where many
 * were deleted shortly before. $TMPDIR overrules that.
 */
export function machinesDirectory(): string {
  const memory = "/dev/shm"
  const enough = 6 * 2 ** 30
  try {
    accessSync(memory, open.W_OK)
    const { bavail, bsize } = statfsSync(memory)
    return process.env["TMPDIR"] === undefined && bavail * bsize >= enough ? memory : tmpdir()
  } catch {
    return tmpdir()
  }
}

/** How a remote machine differs from a plain Debian with nix-bin. */
export type HostOptions = MachineOptions & {
  name: string
  /** Login shell of root. Default: bash (sh on a busybox host). */
  shell?: "bash" | "zsh" | "dash" | "fish"
  /** Milliseconds that every byte travels, each way. Even 0 puts the proxy in between: see freeze(). */
  delay?: number
  /** Further lines for sshd_config; they win over the lab's own. */
  sshdConfig?: string[]
  /** The home directory is a tmpfs of this size: "20m". */
  diskLimit?: string
  /** Only busybox's programs, rsync, git and Nix. */
  busybox?: boolean
  /** false: Nix only in /nix/var/nix/profiles/default/bin, as after a real installer. Default: true. */
  nixOnPath?: boolean
}

/** How the machine of the user differs from a plain Debian with nix-bin. */
export type ClientOptions = MachineOptions & { hosts: Host[] }

/** How any machine differs from it. */
type MachineOptions = {
  nix?: NixVersion | "none"
  /** Versions of other programs (OpenSSH: the client, and the server of a host). Default: those installed here. */
  rsync?: RsyncVersion
  openssh?: SshVersion
  /** Programs that do what those of macOS do, and no more: see bsd.sh. */
  bsd?: boolean
  /** What its Nix calls its system. Default: the real one. */
  system?: string
  /** Programs that must not be found. */
  hide?: string[]
  /** Whether nix.conf enables flakes. Default: false. */
  flakes?: boolean
  /** Further lines for nix.conf. */
  nixConfig?: string[]
}

/** What a finished command left. */
export type Result = {
  /** Exit code; 128+n if a signal ended it; 124 if the lab did, after the timeout. */
  code: number
  signal?: string
  stdout: string
  stderr: string
  /** stdout as it came. */
  bytes: Uint8Array
  /** true: a process in the background still held stdout or stderr one second after the command had ended. */
  held: boolean
}

/** How to start a command in a machine. Nothing of the environment of the tests is passed on. */
export type RunOptions = {
  cwd?: string
  env?: Record<string, string>
  stdin?: string | Uint8Array
  /** Milliseconds. Default: 120,000. */
  timeout?: number
}

const NAMESPACE_SCRIPT = join(import.meta.dir, "namespace.sh")
const PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
const BUSYBOX_SHELL = "sh"

/** The checkout that the tests belong to; visible at the same place in the client. */
export const REPOSITORY = resolve(import.meta.dir, "../..")

// ── Machines ───

/** What host and client have in common: one name space with its processes and files. */
class Machine {
  readonly home = "/root"
  private ended: Promise<string>

  protected constructor(
    readonly name: string,
    readonly directory: string,
    private alive: number,
    /** Process 1 of the machine, as seen from outside. */
    readonly pid: number,
    private supervisor: Supervisor,
  ) {
    this.ended = supervisor.ended
  }

  /** Where a path of the machine is found on this one. */
  outside(path: string): string {
    const [, top, rest] = /^\/(root|nix|tmp)(\/.*)?$/.exec(path) ?? []
    const bound = top !== undefined && !(top === "root" && this.supervisor.separateHome)
    return bound ? join(this.directory, top, rest ?? "") : `/proc/${this.pid}/root${path}`
  }

  /** Starts a command with pipes; for signals, conversations and terminals. */
  spawn(argv: string[], options: RunOptions & { tty?: boolean } = {}): Running {
    return new Running(this.pid, argv, options)
  }

  /** Runs a command to its end. */
  async run(argv: string[], options: RunOptions = {}): Promise<Result> {
    const running = this.spawn(argv, options)
    running.write(options.stdin ?? "")
    running.end()
    return running.result
  }

  /** Runs a script of /bin/sh to its end. */
  async sh(script: string, options: RunOptions = {}): Promise<Result> {
    return this.run(["/bin/sh", "-c", script], options)
  }

  /** The processes that are not the lab's own: "PID COMMAND LINE" each. */
  async processes(): Promise<string[]> {
    const script = `echo 1 $$ $(cat /run/lab/*.pid 2>/dev/null); /run/lab/usr/bin/ps -A -o pid=,ppid=,args=`
    const { stdout } = await this.sh(script)
    const [first = "", ...list] = stdout.trimEnd().split("\n")
    const [init, shell, ...services] = first.split(" ")
    const ours = new Set([init, shell, ...services])
    const rows = list.map((line) => line.trim().split(/\s+/))
    return rows
      .filter(([pid, parent]) => !ours.has(pid) && parent !== shell)
      .map(([pid, , ...args]) => `${pid} ${args.join(" ")}`)
  }

  /** Ends the machine: returns when its processes, mounts and files are gone. */
  async stop(): Promise<void> {
    if (this.alive >= 0) closeSync(this.alive)
    this.alive = -1
    await this.ended
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await this.stop()
  }

  protected static async boot(settings: Settings): Promise<Boot> {
    if (process.getuid?.() !== 0) throw new Error("lab: the test lab needs root, for mount name spaces")
    const directory = mkdtempSync(join(machinesDirectory(), `edict-lab-${settings.name}-`))
    await writeSettings(directory, settings)
    const { alive, supervisor } = startSupervisor(directory, settings)
    try {
      return { directory, alive, supervisor, pid: await supervisor.ready }
    } catch (error) {
      closeSync(alive)
      await supervisor.ended
      throw error
    }
  }
}

/** A machine that one can reach by ssh. */
export class Host extends Machine {
  private constructor(
    boot: Boot,
    readonly options: HostOptions,
    /** Port on 127.0.0.1: of the proxy if there is one, else of sshd. */
    readonly port: number,
  ) {
    super(options.name, boot.directory, boot.alive, boot.pid, boot.supervisor)
  }

  static async start(options: HostOptions): Promise<Host> {
    for (let attempt = 1; ; attempt++) {
      const ports = {
        sshd: await freePort(),
        proxy: options.delay === undefined ? undefined : await freePort(),
      }
      try {
        const boot = await Machine.boot(await hostSettings(options, ports))
        return new Host(boot, options, ports.proxy ?? ports.sshd)
      } catch (error) {
        if (attempt === 3 || !/address already in use|EADDRINUSE/i.test(String(error))) throw error
      }
    }
  }

  /** What sshd wrote. */
  log(): string {
    return readFileSync(join(this.directory, "sshd.log"), "utf8")
  }

  /** Its public host key, as for known_hosts. */
  hostKey(): string {
    return readFileSync(join(this.directory, "host_key.pub"), "utf8").split(" ", 2).join(" ")
  }

  /** Cuts every ssh connection to it; new ones work. */
  async dropConnections(): Promise<void> {
    const cut = "kill -USR1 $(cat /run/lab/proxy.pid)"
    const kill = "/run/lab/usr/bin/pkill -KILL -P $(cat /run/lab/sshd.pid)"
    await this.sh(this.options.delay === undefined ? kill : cut)
  }

  /** Unplugs the network, or plugs it in again: meanwhile nothing arrives, no end of a connection either. */
  async freeze(): Promise<void> {
    if (this.options.delay === undefined) throw new Error("lab: only a host with a delay can be frozen")
    await this.sh("kill -USR2 $(cat /run/lab/proxy.pid)")
  }
}

/** The machine of the user, who knows the hosts by name. */
export class Client extends Machine {
  private constructor(boot: Boot) {
    super("client", boot.directory, boot.alive, boot.pid, boot.supervisor)
  }

  static async start(options: ClientOptions): Promise<Client> {
    const client = new Client(await Machine.boot(await clientSettings(options)))
    await client.introduce(options.hosts)
    return client
  }

  /** A path below the home directory, as seen on the client. */
  path(...parts: string[]): string {
    return join(this.home, ...parts)
  }

  /** Makes it known to hosts, and them to it: keys, known_hosts, ssh config. */
  private async introduce(hosts: Host[]): Promise<void> {
    const ssh = this.outside("/root/.ssh")
    const keygen = await this.sh(`ssh-keygen -q -t ed25519 -N "" -C edict -f /root/.ssh/id_ed25519`)
    if (keygen.code !== 0) throw new Error(`lab: ssh-keygen: ${keygen.stderr}`)
    const key = readFileSync(join(ssh, "id_ed25519.pub"), "utf8")
    const known = hosts.map((host) => `[127.0.0.1]:${host.port} ${host.hostKey()}\n`)
    await writeFile(join(ssh, "known_hosts"), known.join(""))
    await writeFile(join(ssh, "config"), hosts.map(sshConfigEntry).join("\n"))
    await writeFile(this.outside("/root/.gitconfig"), GIT_CONFIG)
    await Promise.all(hosts.map((host) => appendFile(host.outside("/root/.ssh/authorized_keys"), key)))
  }
}

/** Starts a remote machine. Several at once: `Promise.all`. */
export async function startHost(options: HostOptions): Promise<Host> {
  return withStore(await Host.start(options), options.nix ?? "2.8")
}

/** Starts the machine of the user, who can ssh to the hosts. */
export async function startClient(options: ClientOptions): Promise<Client> {
  return withStore(await Client.start(options), options.nix ?? "2.8")
}

/** Initialises the store: of two Nix 2.8 that do it at the same time, one may fail. */
async function withStore<T extends Host | Client>(machine: T, nix: NixVersion | "none"): Promise<T> {
  const paths = "PATH=$PATH:/nix/var/nix/profiles/default/bin"
  if (nix !== "none") await machine.sh(`${paths} nix-store --init || :`)
  return machine
}

// ── Settings of a machine ───

type Ports = { sshd: number; proxy?: number | undefined }

type Settings = {
  name: string
  variables: Record<string, string>
  nixConf: string
  sshdConfig?: string
}

async function hostSettings(options: HostOptions, ports: Ports): Promise<Settings> {
  const shell = options.shell ?? (options.busybox ? BUSYBOX_SHELL : "bash")
  return {
    name: options.name,
    nixConf: nixConf(options),
    sshdConfig: sshdConfig(ports.sshd, options.sshdConfig ?? []),
    variables: {
      ...(await programVariables(options, (options.nixOnPath ?? true) ? "path" : "profile")),
      SHELL_NAME: shell,
      DISK_LIMIT: options.diskLimit ?? "",
      BUSYBOX: options.busybox ? "yes" : "",
      REPOSITORY: "",
      SSHD_PORT: String(ports.sshd),
      PROXY_PORT: String(ports.proxy ?? ""),
      DELAY: String(options.delay ?? ""),
    },
  }
}

async function clientSettings(options: ClientOptions): Promise<Settings> {
  return {
    name: "client",
    nixConf: nixConf(options),
    variables: {
      ...(await programVariables(options, "path")),
      SHELL_NAME: "bash",
      DISK_LIMIT: "",
      BUSYBOX: "",
      REPOSITORY,
      SSHD_PORT: "",
      PROXY_PORT: "",
      DELAY: "",
    },
  }
}

/** What namespace.sh needs to know of the programs of a machine, and where its Nix is found. */
async function programVariables(
  options: MachineOptions,
  place: "path" | "profile",
): Promise<Record<string, string>> {
  const { nix = "2.8", rsync, openssh, bsd, hide = [] } = options
  return {
    NIX_DIR: nix === "none" ? "" : await versionDirectory("nix", nix),
    NIX_PLACE: nix === "none" ? "none" : place,
    RSYNC_DIR: rsync ? await versionDirectory("rsync", rsync) : "",
    OPENSSH_DIR: openssh ? await versionDirectory("openssh", openssh) : "",
    BSD: bsd ? "yes" : "",
    HIDE: hide.join(" "),
  }
}

/**
 * Builds as root without sandbox, and never asks the network for anything. Without flakes newer versions of Nix
 * would complain about a flake-registry here; /etc/nsswitch.conf lets them find no server instead.
 */
function nixConf(options: { system?: string; flakes?: boolean; nixConfig?: string[] }): string {
  const lines = [
    "sandbox = false",
    "build-users-group =",
    "substituters =",
    "download-attempts = 1",
    "fsync-metadata = false",
    ...(options.system ? [`system = ${options.system}`] : []),
    ...(options.flakes ? FLAKES : []),
    ...(options.nixConfig ?? []),
  ]
  return lines.join("\n") + "\n"
}

const FLAKES = ["experimental-features = nix-command flakes", "flake-registry = /etc/nix/registry.json"]

/** sshd takes the first value of an option, so the lines of the test stand first. */
function sshdConfig(port: number, lines: string[]): string {
  const own = [
    "ListenAddress 127.0.0.1",
    `Port ${port}`,
    "HostKey /run/lab/dir/host_key",
    "PidFile none",
    "PermitRootLogin yes",
    "PasswordAuthentication no",
    "KbdInteractiveAuthentication no",
    "StrictModes no",
    "UsePAM no",
    "UseDNS no",
    "PrintMotd no",
    "PrintLastLog no",
    "AcceptEnv LANG LC_*",
    "MaxSessions 100",
    "MaxStartups 100",
    "Subsystem sftp internal-sftp",
  ]
  return [...lines, ...own].join("\n") + "\n"
}

function sshConfigEntry(host: Host): string {
  const lines = [
    `Host ${host.name}`,
    "  HostName 127.0.0.1",
    `  Port ${host.port}`,
    "  User root",
    "  IdentityFile /root/.ssh/id_ed25519",
    "  IdentitiesOnly yes",
    "  UserKnownHostsFile /root/.ssh/known_hosts",
    "  StrictHostKeyChecking yes",
  ]
  return lines.join("\n") + "\n"
}

const GIT_CONFIG = `[user]
  name = Ed
  email = ed@example.org
[init]
  defaultBranch = main
`

async function writeSettings(directory: string, settings: Settings): Promise<void> {
  const variables = { NAME: settings.name, BUN: process.execPath, ...settings.variables }
  const env = Object.entries(variables).map(
    ([name, value]) => `${name}='${value.replaceAll("'", `'\\''`)}'\n`,
  )
  await writeFile(join(directory, "env"), env.join(""))
  await writeFile(join(directory, "nix.conf"), settings.nixConf)
  await writeFile(join(directory, "registry.json"), `{ "flakes": [], "version": 2 }\n`)
  await writeFile(join(directory, "sshd_config"), settings.sshdConfig ?? "")
  for (const name of ["proxy.ts", "bsd.sh"]) copyFileSync(join(import.meta.dir, name), join(directory, name))
}

const usedPorts = new Set<number>()

/** A port nobody listens on, below those that the kernel gives to outgoing connections. */
async function freePort(): Promise<number> {
  for (;;) {
    const port = 10_000 + Math.floor(Math.random() * 22_000)
    if (usedPorts.has(port)) continue
    const free = await new Promise<boolean>((done) => {
      const server = createServer()
      server.once("error", () => done(false))
      server.listen(port, "127.0.0.1", () => server.close(() => done(true)))
    })
    usedPorts.add(port)
    if (free) return port
  }
}

// ── Life and death ───

type Boot = { directory: string; alive: number; supervisor: Supervisor; pid: number }

type Supervisor = {
  ready: Promise<number>
  /** Resolves, with what namespace.sh printed, when all of the machine is gone. */
  ended: Promise<string>
  separateHome: boolean
}

/**
 * Starts namespace.sh, outside of our process group. It ends when the write end of its standard input closes,
 * and we alone have that: so it also ends when we are killed.
 */
function startSupervisor(directory: string, settings: Settings): { alive: number; supervisor: Supervisor } {
  const fifo = join(directory, "alive")
  Bun.spawnSync(["mkfifo", fifo])
  const alive = openSync(fifo, open.O_RDWR)
  const input = openSync(fifo, open.O_RDONLY)
  const child = Bun.spawn(["setsid", "--fork", "bash", NAMESPACE_SCRIPT, directory], {
    stdin: input,
    stdout: "pipe",
    stderr: "inherit",
    env: { PATH },
  })
  closeSync(input)
  const separateHome = settings.variables["DISK_LIMIT"] !== ""
  return { alive, supervisor: { ...follow(settings.name, child.stdout), separateHome } }
}

/** Reads "ready PID", and then the end, from the output of namespace.sh. */
function follow(name: string, output: ReadableStream<Uint8Array>): Pick<Supervisor, "ready" | "ended"> {
  const ready = Promise.withResolvers<number>()
  const read = async (): Promise<string> => {
    let text = ""
    const decoder = new TextDecoder()
    for await (const chunk of output) {
      text += decoder.decode(chunk, { stream: true })
      const pid = /^ready (\d+)$/m.exec(text)
      if (pid) ready.resolve(Number(pid[1]))
    }
    ready.reject(new Error(`lab: ${name} did not start: ${text.trim() || "see tests/lab/setup.sh"}`))
    return text
  }
  ready.promise.catch(() => undefined)
  return { ready: ready.promise, ended: read() }
}

// ── Commands in a machine ───

/** A command that runs in a machine. */
export class Running {
  /** Resolves when it has ended; never rejects. */
  readonly result: Promise<Result>
  private child: Bun.Subprocess<"pipe", "pipe", "pipe">
  private out: Collector
  private err: Collector
  private timedOut = false

  constructor(machine: number, argv: string[], options: RunOptions & { tty?: boolean }) {
    const command = options.tty ? onTerminal(argv) : argv
    const enter = ["nsenter", "--target", String(machine), "--mount", "--uts", "--pid", "--"]
    const goTo = [
      "/bin/sh",
      "-c",
      `cd "$1" && shift && unset OLDPWD && exec "$@"`,
      "sh",
      options.cwd ?? "/root",
    ]
    this.child = Bun.spawn([...enter, ...goTo, ...command], {
      stdin: "pipe",
      stdout: "pipe",
      stderr: "pipe",
      env: { ...ENVIRONMENT, ...options.env },
    })
    this.out = new Collector(this.child.stdout)
    this.err = new Collector(this.child.stderr)
    this.result = this.finish(options.timeout ?? 120_000)
  }

  /** What it wrote so far. */
  get stdout(): string {
    return this.out.text()
  }

  get stderr(): string {
    return this.err.text()
  }

  write(data: string | Uint8Array): void {
    if (data.length > 0) this.child.stdin.write(data)
    void this.child.stdin.flush()
  }

  /** Closes its standard input. */
  end(): void {
    void this.child.stdin.end()
  }

  /** The process id of the command itself, as seen from outside the machine. */
  async pid(): Promise<number> {
    const children = `/proc/${this.child.pid}/task/${this.child.pid}/children`
    while (this.child.exitCode === null && this.child.signalCode === null) {
      const pid = Number(readFileSync(children, "utf8").trim())
      if (pid > 0) return pid
      await Bun.sleep(2)
    }
    throw new Error("lab: the command has ended")
  }

  /** Sends a signal to the command itself, not to its children. */
  async kill(signal: NodeJS.Signals = "SIGTERM"): Promise<void> {
    process.kill(await this.pid(), signal)
  }

  /** Waits until stdout and stderr together match; throws when the command ends first, or after the timeout. */
  async waitFor(pattern: RegExp | string, timeout = 30_000): Promise<void> {
    const end = performance.now() + timeout
    const seen = () => {
      const text = this.stdout + this.stderr
      return typeof pattern === "string" ? text.includes(pattern) : pattern.test(text)
    }
    while (!seen()) {
      const ended = this.out.closed && this.err.closed
      if (ended || performance.now() > end) {
        throw new Error(
          `lab: no ${pattern} ${ended ? "until the end" : "in time"}:\n${this.stdout}\n${this.stderr}`,
        )
      }
      await Bun.sleep(10)
    }
  }

  private async finish(timeout: number): Promise<Result> {
    const timer = setTimeout(() => void this.giveUp(), timeout)
    await this.child.exited
    clearTimeout(timer)
    const held = !(await Promise.race([
      Promise.all([this.out.end, this.err.end]).then(() => true),
      Bun.sleep(1000).then(() => false),
    ]))
    const signal = this.child.signalCode
    const code = this.timedOut ? 124 : (this.child.exitCode ?? 128 + signalNumber(signal))
    const texts = { stdout: this.out.text(), stderr: this.err.text() }
    return { code, ...(signal ? { signal: String(signal) } : {}), ...texts, bytes: this.out.bytes(), held }
  }

  private async giveUp(): Promise<void> {
    this.timedOut = true
    await this.kill("SIGKILL").catch(() => undefined)
    this.child.kill("SIGKILL")
  }
}

const ENVIRONMENT = {
  PATH: `${PATH}:/run/lab/bin`,
  HOME: "/root",
  USER: "root",
  LOGNAME: "root",
  SHELL: "/bin/bash",
  LANG: "C.UTF-8",
  TERM: "xterm",
}

/** Gathers what a stream brings. */
class Collector {
  readonly end: Promise<void>
  closed = false
  private chunks: Uint8Array[] = []

  constructor(stream: ReadableStream<Uint8Array>) {
    this.end = this.gather(stream)
  }

  private async gather(stream: ReadableStream<Uint8Array>): Promise<void> {
    for await (const chunk of stream) this.chunks.push(chunk)
    this.closed = true
  }

  bytes(): Uint8Array {
    return Buffer.concat(this.chunks)
  }

  text(): string {
    return Buffer.concat(this.chunks).toString("utf8")
  }
}

function signalNumber(signal: string | number | null): number {
  if (signal === null) return 0
  return typeof signal === "number" ? signal : (constants.signals[signal as NodeJS.Signals] ?? 0)
}

/** script(1) has no terminal here whose size it could take over. */
function onTerminal(argv: string[]): string[] {
  const sized = ["/bin/sh", "-c", `stty rows 24 cols 80; exec "$@"`, "sh", ...argv]
  return ["/run/lab/usr/bin/script", "-qefc", shellWords(sized), "/dev/null"]
}

/** Words as one line for any POSIX shell. */
export function shellWords(argv: string[]): string {
  return argv.map((word) => `'${word.replaceAll("'", `'\\''`)}'`).join(" ")
}
