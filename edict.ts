#!/usr/bin/env -S bun --no-env-file --config=/dev/null --install=fallback
/*
 * edict: `edict HOST nix …` runs a Nix command on another machine as if it ran here.
 *
 *   argv ─parseArguments→ Invocation ─scan, map→ Plan ─upload, run→ Outcome ─results, sync back→ exit code
 *
 *   scan       which words of the command are local flakes and files, as Nix itself reads them
 *   map        which source trees they need, and where these lie over there
 *   upload     what changed since the last agreed state goes over by rsync, or else by tar
 *   run        the command runs there; stdin, stdout, stderr and the exit code pass through
 *   results    result links that it made are made here, after their closures came home
 *   sync back  files that it changed come home, and never over an edit made here meanwhile
 *
 * Needed here: bash, ssh, tar; git for git trees; nix and xargs for results. Needed there: a POSIX sh with find, stat,
 * awk, tar and friends (GNU, BSD, BusyBox), nix. rsync is used where both sides have it. Nothing of edict is installed
 * over there.
 *
 * One file on purpose: copy it, read it, change it. What is exported is exported for the tests; it is no
 * stable interface. Contents:
 *
 *    1 Help           7 Trees and map   13 Sync back        19 Many hosts
 *    2 Types          8 Local state     14 Commits          20 Probe
 *    3 Main           9 Git copies      15 Remote scripts   21 Pick
 *    4 Arguments     10 Upload          16 Session          22 Hosts, doctor, clean, completion
 *    5 Hosts         11 Run             17 Ssh              23 Files, messages and errors
 *    6 Scan          12 Results         18 Processes
 */
import diagnostics from "node:diagnostics_channel"
import fs from "node:fs"
import os from "node:os"
import path from "node:path"
import type { Readable } from "node:stream"
import type { ProcessPromise } from "zx/core"

// ── 1. Help ─────────────────────────────────────────────────────────────────────────────────────────────

export const VERSION = "0.1.0"

export const USAGE = `edict ${VERSION}: run a Nix command on another machine as if it ran here

usage: edict [options] HOST nix COMMAND…            any Nix command (also nix-build, nix-shell, nixos-rebuild, …)
       edict [options] HOST FLAKEREF [-- ARGS…]     short for: nix run FLAKEREF -- ARGS
       edict [options] nix COMMAND…                 on the default host (config "default", or $EDICT_HOST)

       edict --doctor HOST… | --hosts | --clean HOST… | --completion bash|zsh|fish

HOST is a name of the host config, [user@]host, an alias of ssh_config, ssh://[user@]host[:port], or @TAG (every
host of the config with that tag; @all). With several, the command runs on all of them, or on one with --pick.
Options stand before HOST; everything after it belongs to the command.

  --sync            bring the current directory along and its changes home, flake or not
  --no-sync         bring no change home
  -n, --dry-run     print the plan as the shell lines that would run; contacts no host, changes nothing
  --json            print the plan of --dry-run, or what --hosts and --doctor found, as JSON
  --pick            run on one host of the list: the best that fits the system and answers
  --system SYSTEM   the system that --pick needs (default: the one that the command names, else the one here)
  --features LIST   system features that --pick needs, with commas between them
  --jobs N, --fail-fast   with several hosts: at most N at once; stop the rest at the first failure
  --materialize DIR   bring the files of the results as plain files into DIR, links followed; needs no Nix here
  --report FILE     write what happened as JSON: host, exit code, times, bytes, links, changed files, conflicts
  --allow-mass-delete   let the command delete more than half of the tracked files here, too
  -v                trace every command with its time; -vv: what the remote side answers too
  -q, --quiet       say nothing but errors
  --tty, --no-tty   force / forbid a remote terminal (default: if stdin, stdout and stderr are one)
  -A, --forward-agent   forward the ssh agent (for private inputs)
  -o OPTION, -p PORT, -i FILE, -F FILE, -J HOST     handed to ssh, as ssh takes them
  --config FILE     instead of $XDG_CONFIG_HOME/edict/config.toml (or else /etc/edict/config.toml)
  --link-suffix TEXT   what the names of result links end in (with several hosts: -NAME)
  --doctor HOST…    say what works between here and there, and how to mend what does not
  --hosts           list the hosts of the config, and whether they answer
  --clean HOST…     remove what edict left on a host
  --completion SHELL   print completions for bash, zsh or fish (--complete-hosts: the words that they offer for HOST)
  --help, --version   print this; print the version

examples:
  edict root@big nix build .#my-package       result -> /nix/store/… here
  edict root@big nix flake update .           flake.lock changes here
  edict root@big nix run .#integration-test   runs there, exit code here
  edict root@big .#bump-versions              nix run, and the files that it changes come home

environment: EDICT_HOST (default host), EDICT_CONFIG (like --config), NO_COLOR (no colours, no line of progress)

exit codes: the command's own; 255 ssh failed; 254 edict failed (usage, config, upload, retrieval, conflict);
128+n when signal n ended it (130 on Ctrl-C)
`

// ── 2. Types: argv → Invocation → Plan → Report ─────────────────────────────────────────────────────────

type Env = Readonly<Record<string, string | undefined>>

/** What the user typed; nothing is looked up yet. */
export type Options = Readonly<{
  sync: "auto" | "always" | "never"
  action: "run" | "dry-run" | "help" | "version" | "hosts" | "doctor" | "clean" | "completion" | "complete"
  json: boolean
  verbosity: number // -1 quiet, 0, 1 trace, 2 trace and remote answers
  tty: "auto" | "always" | "never"
  allowMassDelete: boolean
  pick: boolean
  system?: string // that --pick has to fit
  features: readonly string[] // that it needs
  jobs: number // hosts at once
  failFast: boolean
  linkSuffix: string // what the names of result links end in, with several hosts: "-NAME"
  materialize?: string // the directory for the files of the results
  report?: string
  config?: string
  sshOptions: readonly string[]
}>

/** `hosts` is undefined when the command runs on the default host; `command` starts with a program's name. */
export type Invocation = Readonly<{ options: Options; host?: string; command: readonly string[] }>

/** A machine that commands run on, as the host config and the command line describe it. */
export type Host = Readonly<{
  name: string
  destination: string // [user@]host, for ssh and rsync
  sshOptions: readonly string[]
  directory: string // where trees live over there, relative to the home directory or absolute
  env: Readonly<Record<string, string>>
  requireSignatures: boolean
  import?: "sudo" // paths come in through sudo nix-store --import
  compress: boolean | "auto"
  substitute: boolean // ask the substituters here before the host
  sendInputs: boolean // locked inputs are fetched here
  systems: readonly string[]
  features: readonly string[]
  mandatoryFeatures: readonly string[]
  speed: number
  tags: readonly string[]
  knownHosts?: Readonly<{ file: string; line: string }> // a host key from the machines file
}>

/**
 * A source tree that travels. `git`: what git tracks and does not ignore, and a slim copy of .git.
 * `directory`: exactly this directory. `file`: one file. `output`: a path that the command may create.
 */
export type Tree = Readonly<{
  id: string
  kind: "git" | "directory" | "file" | "output"
  local: string // absolute path here
  remote: string // below the host's directory
  history: "head" | "full" // how much of the git history travels
  comesHome: "all" | "lock-file" | "nothing"
  input?: string // set for a locked input: the name under which it is added to the store over there
}>

/** A word of the command that names something here. */
export type MappedReference = Readonly<{ index: number; word: string; kind: string; rewritten: string }>

/** Everything that was looked up. After this nothing is decided, only done. */
export type Plan = Readonly<{
  host: Host
  options: Options
  stateful: boolean
  implicit: boolean
  references: readonly MappedReference[]
  trees: readonly Tree[]
  cwd: Readonly<{ local: string; remote: string }>
  linkDirectories: readonly Readonly<{ local: string; remote: string }>[] // where result links may appear
  linkPrefix: string // what the names of result links begin with
  storePaths: readonly string[] // that the command names by a link here
  inputs: readonly LockedInput[] // that are sent from here if the host lacks them
  settings: readonly string[] // lines for NIX_CONFIG: those of the command that are secret
  command: readonly RemoteWord[]
  monitor: "none" | "nom" // whether nom, here, shows the command's log
  next?: readonly RemoteWord[] // what runs after the command, if that ended well
  root: string // where this machine's trees are over there
  seed: string // the same for slot 0, whose trees the ones of other slots start from; "" in slot 0
  system?: string
}>

/**
 * A word of the command over there. `home` words stand for `prefix` + absolute path of `home` + `suffix`, where `home`
 * with `of` is still the same for all runs; `update` is a positional of `nix flake update`: a flake before Nix 2.19,
 * an input's name since.
 */
export type RemoteWord =
  | string
  | Readonly<{ prefix: string; home: string; suffix: string; of?: "run" }>
  | Readonly<{ update: string }>

/** An input in flake.lock, and the store path where Nix looks for it before it fetches: it follows from the hash. */
export type LockedInput = Readonly<{ name: string; path: string; locked: Readonly<Record<string, unknown>> }>

/** A path inside a tree, byte by byte: each character is one byte (latin1). */
type Name = string

/** One path of a tree. `identity` is what stat says (inode, size, mtime, ctime); "" is never trusted. */
export type Entry = Readonly<{
  type: "file" | "link" | "directory"
  mode: number
  identity: string
  hash: string
}>

/**
 * The last state of a tree that both sides agreed on; `token` names it on both sides. After changes came home the
 * other side may not have heard of it yet, and still call it `previous`.
 */
export type Manifest = Readonly<{
  token: string
  previous?: string
  entries: ReadonlyMap<Name, Entry>
  pruned: readonly Name[]
  newest?: string // newest mtime in a plain directory, in seconds
  fingerprint?: string // of every path and what stat says of it, if all of that can be trusted
}>

/** A path of a tree as it is here now, and where its bytes are read from (.git comes from a copy). */
type Source = Readonly<{ name: Name; root: string; inner: Name; seen: string; entry: Entry }>

/** A tree during a run, and the state of it that both sides agree on. */
type TreeState = Readonly<{ tree: Tree; manifest: Manifest; places?: readonly Place[] }>

/** What has to go over so that the remote tree equals the local one. */
export type Delta = Readonly<{
  send: readonly Source[]
  remove: readonly Name[]
  removeDirectories: readonly Name[]
  newest?: string // set if it has to become so there
}>

/** One path that the command created, changed or deleted over there. */
export type Change = Readonly<{
  name: Name
  what: "created" | "changed" | "deleted"
  type: "file" | "link" | "directory" | "other"
  mode: number
  size: number // as the other side says
  modeOnly: boolean
  target?: string // text of a symbolic link
}>

export type ResultLink = Readonly<{ link: string; target: string; isProfile?: boolean }>

/** What became of one change here. */
export type Applied = Readonly<{
  name: Name
  verdict: "applied" | "same" | "conflict" | "refused" | "failed"
  counts?: "counts" // a change that a user would see
  why?: string
  kept?: string // where the remote version of a conflict lies here
  entry?: Entry // what lies there now, for the manifest
}>

/** What --report writes as JSON; of several hosts a list, with HostFields in each. README has a table of the fields. */
export type Report = {
  /** Name of the host, as the command line or the hosts file has it. */
  host: string
  /** The exit code of edict, and so that of the command if edict itself did not fail. */
  exitCode: number
  /** Set if edict failed: the line that it said. */
  error?: string
  /** Set if a signal came, like SIGINT; the first one. */
  signal?: string
  /** How long edict ran. */
  milliseconds: number
  /** The stages that there were: connect, scan, upload (if more than a little had to go), run, results, sync back. */
  stages: { stage: string; milliseconds: number }[]
  /** Size of the files and store paths that went over, before compression. */
  bytesUp: number
  /** Size of the changed files, store paths and packs of commits that came home, before compression. */
  bytesDown: number
  /** The result links that were made here, as absolute paths, and the store paths that they lead to. */
  resultLinks: { link: string; target: string }[]
  /** Set with --materialize: where the files lie here, how many and how big, and which did not come and why. */
  materialized?: { directory: string; files: number; bytes: number; skipped: Record<string, string> }
  /** Files that the command created, changed or deleted here, relative to the current directory. */
  changed: string[]
  /** Branches and tags that moved here, by their full names; HEAD if the command switched to another branch. */
  refs: string[]
  /** What changed on both sides: file or ref, where theirs is kept, why, and what to type if there is more to it. */
  conflicts: { file: string; kept?: string; why: string; hint?: string }[]
  /** What else edict had to say. */
  notes: string[]
}

// ── 3. Main ─────────────────────────────────────────────────────────────────────────────────────────────

/**
 * The program: argv (without interpreter and script) and environment in, exit code out.
 * Throws EdictError for what the user can mend; anything else that it throws is a bug.
 */
export async function main(argv: readonly string[], env: Env = process.env): Promise<number> {
  if (argv.length === 1 && argv[0] === "--version") return print(`edict ${VERSION}\n`)
  const invocation = await parseArguments(argv, env)
  const steps = openSteps(invocation.options, env)
  const reporter = openReporter(invocation)
  const tracing = traceCommands(invocation.options, steps)
  try {
    return await perform(invocation, argv, { cwd: process.cwd(), env, steps, reporter })
  } catch (error) {
    noteFailure(reporter.report, error)
    throw error
  } finally {
    steps.end()
    tracing.stop()
    reporter.write()
  }
}

/** Where and how this program runs. */
type Here = Readonly<{ cwd: string; env: Env; steps: Steps; reporter: Reporter }>

/** Does what the options ask for; answers the exit code. */
async function perform(invocation: Invocation, argv: readonly string[], here: Here): Promise<number> {
  const { env } = here
  if (invocation.options.action === "help") return print(USAGE)
  if (invocation.options.action === "version") return print(`edict ${VERSION}\n`)
  if (invocation.options.action === "completion") return print(completionScript(invocation.host ?? ""))
  const config = await readConfig(invocation.options, env)
  if (invocation.options.action === "complete") return print(hostWords(config, env))
  if (invocation.options.action === "hosts") return await listHosts(config, invocation.options, env)
  const hosts = chooseHosts(config, invocation, env)
  if (invocation.options.action === "doctor") return await examine(hosts, invocation.options, env)
  if (invocation.options.action === "clean") return await cleanHosts(hosts, invocation.options, env)
  checkTogether(invocation, hosts, here.cwd)
  if (invocation.options.action === "dry-run") return describe(invocation, hosts, here)
  const chosen = invocation.options.pick
    ? [await pickHost(invocation, hosts, here)]
    : await withoutTwins(hosts)
  return chosen.length === 1
    ? await runAlone(invocation, chosen[0]!, here)
    : await runOnMany(invocation, chosen, { argv, reporter: here.reporter })
}

/** The command on one host, in the first slot whose trees nobody else uses. */
async function runAlone(invocation: Invocation, host: Host, here: Here): Promise<number> {
  followParent(here.env)
  here.reporter.report.host = host.name
  const { plan, locks } = takeFreeSlot(invocation, { host, ...here })
  try {
    const code = await runOn(plan, here)
    rememberHost(plan, here.env)
    if (code !== 0 || plan.next === undefined) return code
    return await runOn({ ...plan, command: plan.next, monitor: "none", next: undefined }, here)
  } finally {
    for (const lock of locks) fs.closeSync(lock)
  }
}

/** Throws UsageError for what does not go with this number of hosts, or would find no place here. */
function checkTogether({ options, command }: Invocation, hosts: readonly Host[], cwd: string): void {
  if (isNom(command[0]!) && hosts.length > 1 && !options.pick)
    throw new UsageError(
      "nom shows the log of one host",
      `name one of them, or without nom: ${shownCommand(["edict", hosts.map(({ name }) => name).join(","), command[0]!.replace("nom", "nix"), ...command.slice(1)])}`,
    )
  if (options.materialize !== undefined) checkFree(options.materialize, cwd)
}

/** Prints what would be done on each host. */
function describe(invocation: Invocation, hosts: readonly Host[], here: { cwd: string; env: Env }): number {
  const plans = hosts.map((host) => makePlan(invocation, { host, ...here, slot: 0 }))
  if (invocation.options.json && plans.length === 1) return print(planAsJson(plans[0]!))
  if (invocation.options.json)
    return print(`[${plans.map((plan) => planAsJson(plan).trimEnd()).join(",\n")}]\n`)
  return print(plans.map(describePlan).join("\n"))
}

/** One plan on its host, stage after stage. */
async function runOn(plan: Plan, here: Here): Promise<number> {
  const { report } = here.reporter
  const context = await startContext(plan, here)
  const watch = handleSignals(context)
  try {
    const connecting = stage(context, "connect", () => connect(context))
    const [scans] = await Promise.all([stage(context, "scan", () => scanTrees(context)), connecting]).catch(
      async (error: unknown) => {
        for (const child of context.children) child.kill("SIGTERM")
        await connecting.catch(() => undefined) // a connection that is half open could not be closed
        throw error
      },
    )
    const { states, outcome } = (await runAtOnce(context, scans)) ?? (await runAfterUpload(context, scans))
    context.ran = "to its end"
    const failure = await firstTrouble(context, [
      stage(context, "results", () =>
        plan.options.materialize === undefined
          ? fetchResults(context, outcome)
          : materialize(context, outcome, plan.options.materialize),
      ).catch((error: unknown) => {
        throw isInterrupted(context) ? withoutResults(plan.host) : error
      }),
      stage(context, "sync back", () => syncBack(context, states, outcome)),
    ])
    const trouble = failure ?? (outcome.unheard ? endedUnheard(plan.host) : undefined)
    tellChanges(context)
    explainOutcome(context, outcome.exitCode)
    // Nix itself ends with 1 when it is interrupted; a command's own code counts.
    const isSignalled = outcome.exitCode === 1 || isInterrupted(context)
    const code = context.signal && isSignalled ? signalCode(context.signal) : outcome.exitCode
    if (trouble) noteFailure(report, trouble)
    report.exitCode = report.conflicts.length > 0 ? EDICT_FAILED : code
    if (trouble) report.exitCode = tell(trouble, context.steps)
    return report.exitCode
  } catch (error) {
    await delay(100) // Ctrl-C ends what we started, too; we may hear of that first, and of the signal now
    throw error
  } finally {
    watch.dispose()
    await endContext(context)
  }
}
// ── 4. Arguments: argv and environment → Invocation ─────────────────────────────────────────────────────
// Looks nothing up. Options stand before HOST; the first word that is none ends them.

const SSH_VALUE_OPTIONS = ["o", "p", "i", "F", "J"] as const
const VALUE_OPTIONS = [
  "report",
  "config",
  "system",
  "features",
  "jobs",
  "completion",
  "link-suffix",
  "materialize",
] as const
const VALUE_WORD = new RegExp(`^(--(?:${VALUE_OPTIONS.join("|")}))(?:=(.*))?$`, "s")
const FLAG_OPTIONS = [
  "hosts",
  "doctor",
  "clean",
  "complete-hosts",
  "pick",
  "fail-fast",
  "sync",
  "dry-run",
  "json",
  "allow-mass-delete",
  "quiet",
  "tty",
  "forward-agent",
  "help",
  "version",
] as const
const FLAG_LETTERS = ["v", "n", "q", "A", "h"] as const
const FLAG_WORDS: readonly string[] = [
  ...[...FLAG_OPTIONS, "no-sync", "no-tty"].map((name) => `--${name}`),
  ...FLAG_LETTERS.map((letter) => `-${letter}`),
]

/**
 * Reads edict's own options and cuts the rest into host and command, byte for byte.
 * Throws UsageError for an unknown option, a missing value, host or command.
 */
export async function parseArguments(argv: readonly string[], env: Env): Promise<Invocation> {
  const { default: minimist } = await load("minimist", () => import("minimist"))
  const [expanded, rest] = splitOptions(argv)
  const parsed = minimist(expanded, {
    string: [...SSH_VALUE_OPTIONS, ...VALUE_OPTIONS],
    boolean: [...FLAG_OPTIONS, ...FLAG_LETTERS],
  })
  const flag = (...names: string[]) => names.some((name) => parsed[name] === true)
  const forced = (name: string) => {
    const last = expanded.findLast((word) => word === `--${name}` || word === `--no-${name}`)
    return last === undefined ? "auto" : last === `--${name}` ? "always" : "never"
  }
  const value = (name: string) => {
    const last: unknown = [parsed[name]].flat().at(-1)
    return typeof last === "string" ? last : undefined
  }
  const options: Options = {
    sync: forced("sync"),
    action: actionOf(flag, value("completion")),
    json: flag("json"),
    verbosity: flag("quiet", "q") ? -1 : expanded.filter((word) => word === "-v").length,
    tty: forced("tty"),
    allowMassDelete: flag("allow-mass-delete"),
    pick: flag("pick"),
    system: value("system"),
    features: (value("features") ?? "").split(",").filter((feature) => feature !== ""),
    jobs: jobsOf(value("jobs")),
    failFast: flag("fail-fast"),
    linkSuffix: value("link-suffix") ?? "",
    materialize: value("materialize"),
    report: value("report"),
    config: value("config"),
    sshOptions: [...sshOptionWords(expanded), ...(flag("A", "forward-agent") ? ["-A"] : [])],
  }
  if (options.json && options.action === "run")
    throw new UsageError("--json goes with --dry-run, --hosts or --doctor", "edict --dry-run --json …")
  for (const name of ["system", "features"] as const)
    if (value(name) !== undefined && !options.pick)
      throw new UsageError(`--${name} goes with --pick`, `edict --pick --${name} ${value(name)!} a,b nix …`)
  if (options.action === "completion") return { options, host: value("completion"), command: [] }
  return { options, ...splitCommand(rest, options, env) }
}

/** What edict itself is asked to do; the first that is given counts. */
function actionOf(flag: (...names: string[]) => boolean, completion: string | undefined): Options["action"] {
  if (flag("help", "h")) return "help"
  if (completion !== undefined) return "completion"
  const actions = ["version", "hosts", "doctor", "clean"] as const
  return (
    actions.find((name) => flag(name)) ??
    (flag("complete-hosts") ? "complete" : flag("dry-run", "n") ? "dry-run" : "run")
  )
}

/** Value of --jobs; as many as there are hosts without it. */
function jobsOf(word: string | undefined): number {
  if (word === undefined) return Number.POSITIVE_INFINITY
  if (!/^[1-9]\d{0,5}$/.test(word))
    throw new UsageError(`--jobs takes a number from 1, not ${shown(word)}`, "edict --jobs 4 …")
  return Number(word)
}

/** Cuts argv where the options end, with `-vv` as `-v -v`, `-p22` and `-p 22` as `-p=22`. */
function splitOptions(argv: readonly string[]): [string[], readonly string[]] {
  const options: string[] = []
  const withValue = (option: string, value: string | undefined) => {
    if (!value) throw new UsageError(`option ${option} needs a value`)
    options.push(`${option}=${value}`)
  }
  for (let at = 0; at < argv.length; at++) {
    const word = argv[at]!
    if (word === "--") return [options, argv.slice(at + 1)]
    if (!word.startsWith("-") || word === "-") return [options, argv.slice(at)]
    const [, letter, attached] = /^(-[opiFJ])(.*)$/s.exec(word) ?? []
    const [, name, assigned] = VALUE_WORD.exec(word) ?? []
    if (letter !== undefined) withValue(letter, attached || argv[++at])
    else if (name !== undefined) withValue(name, assigned ?? argv[++at])
    else if (/^-[vnqAh]{2,}$/.test(word)) options.push(...[...word.slice(1)].map((flag) => `-${flag}`))
    else if (FLAG_WORDS.includes(word)) options.push(word)
    else throw unknownOption(word)
  }
  return [options, []]
}

/** The options of ssh among the expanded words, in their order. */
function sshOptionWords(expanded: readonly string[]): string[] {
  return expanded.flatMap((word) => (/^-[opiFJ]=/.test(word) ? [word.slice(0, 2), word.slice(3)] : []))
}

/** Host and command of the words behind the options. */
function splitCommand(
  rest: readonly string[],
  options: Options,
  env: Env,
): Pick<Invocation, "host" | "command"> {
  const alone = ["help", "version", "hosts", "complete", "completion"]
  if (alone.includes(options.action)) return { command: [] }
  const [first, ...others] = rest
  if (options.action === "doctor" || options.action === "clean") {
    if (rest.some((word) => isNixProgram(word)))
      throw new UsageError(`--${options.action} takes hosts, no command`, `edict --${options.action} HOST`)
    if (first === undefined && options.action === "clean")
      throw new UsageError("--clean takes no default: name the hosts", "edict --clean HOST")
    return { host: first === undefined ? env.EDICT_HOST || undefined : rest.join(","), command: [] }
  }
  if (first === undefined) throw new UsageError("no host and no command given", "edict HOST nix build .#x")
  if (isNixProgram(first)) return { host: env.EDICT_HOST || undefined, command: rest }
  const [program] = others
  if (program === undefined)
    throw new UsageError(`no command given for host ${shown(first)}`, `edict ${shellQuote(first)} nix build`)
  if (isNixProgram(program)) return { host: first, command: others }
  if (program.startsWith("-"))
    throw new UsageError(
      `option ${shown(program)} stands behind the host`,
      `edict ${shellQuote(program)} ${shellQuote(first)} …`,
    )
  return { host: first, command: ["nix", "run", ...others] }
}

function unknownOption(word: string): UsageError {
  const [name = word] = word.split("=", 1)
  if (FLAG_WORDS.includes(name)) return new UsageError(`option ${name} takes no value`, `edict ${name}`)
  const known = [...FLAG_WORDS, ...VALUE_OPTIONS.map((option) => `--${option}`)]
  const close = nearest(
    word,
    known.filter((option) => option.startsWith("--")),
  )
  return new UsageError(`unknown option ${shown(word)}`, close ? `edict ${close}` : "edict --help")
}

// ── 5. Hosts: the host config (TOML), and what HOST on the command line means ───────────────────────────
// Never read from the project directory: a cloned repository must not choose where commands run.

export type HostConfig = Readonly<{
  address?: string
  systems: readonly string[]
  features: readonly string[]
  mandatoryFeatures: readonly string[] // only of the machines file: a host with such takes only what needs them
  speed: number
  tags: readonly string[]
  sshOptions: readonly string[]
  hostKey?: string // a line of a known_hosts file without the name
  directory?: string
  forwardAgent: boolean
  env: Readonly<Record<string, string>>
  requireSignatures: boolean
  import?: "sudo" // paths come in through sudo nix-store --import
  compress: boolean | "auto"
  substitute: boolean // ask the substituters here before the host
  sendInputs: boolean // locked inputs are fetched here
}>
export type Config = Readonly<{
  file: string
  default?: string
  machines?: string
  hosts: Readonly<Record<string, HostConfig>>
}>

const DEFAULT_DIRECTORY = ".cache/edict"

/** What each key of the host config must be; the words appear in error messages. */
const CHECKS = {
  text: { allowed: "a string", check: (value: unknown) => typeof value === "string" && value !== "" },
  address: {
    allowed: "[user@]host or ssh://[user@]host[:port], as a string",
    check: (value: unknown) => typeof value === "string" && isAddress(value),
  },
  number: {
    allowed: "a number above 0",
    check: (value: unknown) => typeof value === "number" && value > 0 && Number.isFinite(value),
  },
  flag: { allowed: "true or false", check: (value: unknown) => typeof value === "boolean" },
  list: {
    allowed: "a list of strings",
    check: (value: unknown) => Array.isArray(value) && value.every((item) => typeof item === "string"),
  },
  table: {
    allowed: "a table of strings",
    check: (value: unknown) =>
      isTable(value) &&
      Object.entries(value).every(([key, text]) => /^[A-Za-z_]\w*$/.test(key) && typeof text === "string"),
  },
  hosts: { allowed: "a table", check: isTable },
  import: { allowed: '"sudo"', check: (value: unknown) => value === "sudo" },
  compress: {
    allowed: 'true, false or "auto"',
    check: (value: unknown) => typeof value === "boolean" || value === "auto",
  },
  directory: {
    allowed: "a path of letters, digits, . _ / -, absolute or below ~/",
    check: (value: unknown) =>
      typeof value === "string" &&
      /^(~\/|\/)?[A-Za-z0-9._][A-Za-z0-9._/-]*$/.test(value) &&
      !/(^|\/)\.\.?(\/|$)/.test(value),
  },
} as const
type Check = keyof typeof CHECKS

const TOP_KEYS: Readonly<Record<string, Check>> = { default: "text", machines: "text", hosts: "hosts" }
const HOST_KEYS: Readonly<Record<string, Check>> = {
  address: "address",
  systems: "list",
  features: "list",
  speed: "number",
  tags: "list",
  "ssh-options": "list",
  directory: "directory",
  "forward-agent": "flag",
  env: "table",
  "require-signatures": "flag",
  import: "import",
  compress: "compress",
  substitute: "flag",
  "send-inputs": "flag",
}

function isTable(value: unknown): value is Record<string, unknown> {
  return typeof value === "object" && value !== null && !Array.isArray(value) && !(value instanceof Date)
}

/** TOML text → Config. Throws EdictError that names file, key and what is allowed. */
export async function parseConfig(text: string, file: string): Promise<Config> {
  const { default: toml } = await load("@iarna/toml", () => import("@iarna/toml"))
  let top: Record<string, unknown>
  try {
    top = toml.parse(text)
  } catch (error) {
    throw new EdictError(`${file}: not TOML: ${String((error as Error).message).split("\n")[0]}`)
  }
  checkKeys(top, TOP_KEYS, file, "")
  const hosts = Object.entries(isTable(top.hosts) ? top.hosts : {}).map(([name, host]) => {
    if (!isTable(host))
      throw new EdictError(`${file}: hosts.${shown(name)} must be a table`, `[hosts.${shown(name)}]`)
    if (name === "" || /^[@-]|,/.test(name) || isNixProgram(name))
      throw new EdictError(
        `${file}: hosts.${shown(name)} cannot be given as HOST: a name begins with no @ or -, has no comma, and is no program of Nix`,
        "choose another name, and put the host into its address",
      )
    checkKeys(host, HOST_KEYS, file, `hosts.${name}.`)
    return [name, hostConfig(host)] as const
  })
  return {
    file,
    default: top.default as string | undefined,
    machines: top.machines as string | undefined,
    hosts: Object.fromEntries(hosts),
  }
}

function checkKeys(
  table: Record<string, unknown>,
  keys: Readonly<Record<string, Check>>,
  file: string,
  prefix: string,
): void {
  for (const [key, value] of Object.entries(table)) {
    const check = Object.hasOwn(keys, key) ? keys[key] : undefined
    if (check === undefined) {
      const close = nearest(key, Object.keys(keys))
      throw new EdictError(
        `${file}: unknown key ${shown(prefix + key)}; allowed: ${Object.keys(keys).join(", ")}`,
        close && `write ${prefix}${close}`,
      )
    }
    if (!CHECKS[check].check(value))
      throw new EdictError(
        `${file}: ${shown(prefix + key)} must be ${CHECKS[check].allowed}, not ${shown(JSON.stringify(value))}`,
      )
  }
}

/** Defaults for a table whose keys were checked. */
function hostConfig(table: Record<string, unknown>): HostConfig {
  return {
    address: table.address as string | undefined,
    systems: (table.systems as string[] | undefined) ?? [],
    features: (table.features as string[] | undefined) ?? [],
    mandatoryFeatures: [],
    speed: (table.speed as number | undefined) ?? 1,
    tags: (table.tags as string[] | undefined) ?? [],
    sshOptions: (table["ssh-options"] as string[] | undefined) ?? [],
    directory: table.directory as string | undefined,
    forwardAgent: table["forward-agent"] === true,
    env: (table.env as Record<string, string> | undefined) ?? {},
    requireSignatures: table["require-signatures"] === true,
    import: table.import as "sudo" | undefined,
    compress: (table.compress as boolean | "auto" | undefined) ?? "auto",
    substitute: table.substitute === true,
    sendInputs: table["send-inputs"] === true,
  }
}

/** The host config of users who have none of their own; the NixOS module writes it. */
const SYSTEM_CONFIG = "/etc/edict/config.toml"

/**
 * Reads the host config: the one named, else the user's own, else the machine's. None of the latter two is an empty
 * config; a missing named one is an error.
 */
async function readConfig(options: Options, env: Env): Promise<Config> {
  const named = options.config ?? (env.EDICT_CONFIG || undefined)
  const own = path.join(env.XDG_CONFIG_HOME || path.join(homeOf(env), ".config"), "edict", "config.toml")
  const file = named ?? [own, SYSTEM_CONFIG].find((name) => fs.existsSync(name))
  if (file === undefined) return { file: own, hosts: {} }
  try {
    const config = await parseConfig(fs.readFileSync(file, "utf8"), file)
    return { ...config, hosts: { ...readMachines(config, env), ...config.hosts } }
  } catch (error) {
    if (error instanceof EdictError) throw error
    throw new EdictError(`${file}: cannot read the host config: ${reason(error)}`)
  }
}

/** The hosts of the machines file that the config names, if it names one. */
function readMachines({ machines, file }: Config, env: Env): Record<string, HostConfig> {
  if (machines === undefined) return {}
  const list = path.resolve(path.dirname(file), machines.replace(/^~(?=\/)/, homeOf(env)))
  try {
    return parseMachines(fs.readFileSync(list, "utf8"), { file: list, include: readText })
  } catch (error) {
    if (error instanceof EdictError) throw error
    throw new EdictError(
      `${file}: machines must be a file that can be read: ${reason(error)}`,
      'machines = "/etc/nix/machines"',
    )
  }
}

type MachinesFile = Readonly<{ file: string; include: (file: string) => string | undefined; depth?: number }>

/**
 * Nix's own list of machines: URI, systems, ssh key, jobs, speed, features, mandatory features, host key in base64;
 * `-` for a default, comments, `;` as a line break, `@FILE` for another file (missing ones are empty), as in Nix's
 * machines.cc. A host is named by what its URI says before any `?`; several lines for one add up. Stores that are no
 * hosts are passed over. Throws EdictError for a line that Nix would not take either.
 */
export function parseMachines(text: string, from: MachinesFile): Record<string, HostConfig> {
  const { file, include, depth = 0 } = from
  const result: Record<string, HostConfig> = {}
  const add = (name: string, host: HostConfig) => {
    result[name] = Object.hasOwn(result, name) ? joinMachines(result[name]!, host) : host
  }
  for (const raw of text.split(/[\n;]/)) {
    const line = raw.replace(/#.*/, "").trim()
    if (line.startsWith("@")) {
      const other = path.resolve(path.dirname(file), line.slice(1).trim())
      const found =
        depth < 10 ? parseMachines(include(other) ?? "", { file: other, include, depth: depth + 1 }) : {}
      for (const [name, host] of Object.entries(found)) add(name, host)
    } else if (line !== "") {
      const machine = parseMachine(line, file)
      if (machine) add(...machine)
    }
  }
  return result
}

/** One line of a machines file; undefined for a store that ssh does not lead to. */
function parseMachine(line: string, file: string): [name: string, host: HostConfig] | undefined {
  const [uri = "", systems, key, jobs, speed, features, mandatory, hostKey] = line
    .split(/\s+/)
    .map((field) => (field === "-" ? "" : field))
  const isHost = uri.includes("://")
    ? /^ssh(-ng)?:\/\//.test(uri)
    : !uri.includes("/") && !/^(auto|daemon|local)(\?|$)/.test(uri)
  if (uri === "" || !isHost) return undefined
  const wrong = (what: string, allowed: string, value: string) =>
    new EdictError(
      `${file}: ${shown(uri)}: ${what} must be ${allowed}, not ${shown(value)}`,
      "- for the default",
    )
  const address = uri.replace(/\?.*$/, "")
  if (!isAddress(address)) throw wrong("the URI", "ssh://[user@]host[:port]", uri)
  if (jobs && !/^\d+$/.test(jobs)) throw wrong("the fourth field (jobs)", "a whole number", jobs)
  if (speed && !(Number(speed) >= 0)) throw wrong("the fifth field (speed)", "a number", speed)
  const publicKey = Buffer.from(hostKey ?? "", "base64")
    .toString("utf8")
    .trim()
  if (hostKey && !/^[a-z0-9@.-]+ [A-Za-z0-9+/]+=*( [^\n]*)?$/.test(publicKey))
    throw wrong("the eighth field (host key)", "a line of known_hosts without the name, in base64", hostKey)
  const list = (field: string | undefined) => (field ? field.split(",").filter((item) => item !== "") : [])
  const host = {
    ...hostConfig({
      address,
      systems: list(systems),
      features: list(features),
      speed: Number(speed) || 1,
      "ssh-options": key ? ["-i", key] : [],
    }),
    mandatoryFeatures: list(mandatory),
    hostKey: publicKey === "" ? undefined : publicKey,
  }
  return [address.replace(/^ssh(-ng)?:\/\//, "").replace(/\/$/, ""), host]
}

/** Two lines of a machines file for one host: what either offers. */
function joinMachines(a: HostConfig, b: HostConfig): HostConfig {
  const both = (one: readonly string[], other: readonly string[]) => [...new Set([...one, ...other])]
  const anySystem = a.systems.length === 0 || b.systems.length === 0
  return {
    ...a,
    systems: anySystem ? [] : both(a.systems, b.systems),
    features: both(both(a.features, b.features), both(a.mandatoryFeatures, b.mandatoryFeatures)),
    mandatoryFeatures: a.mandatoryFeatures.filter((feature) => b.mandatoryFeatures.includes(feature)),
    speed: Math.max(a.speed, b.speed),
    hostKey: a.hostKey ?? b.hostKey,
  }
}

/**
 * The hosts that an invocation means, each once. Throws UsageError where none is named and none is the default, or a
 * tag that no host has.
 */
export function chooseHosts(config: Config, invocation: Invocation, env: Env): Host[] {
  const word = invocation.host ?? config.default
  if (word === undefined)
    throw new UsageError(
      "no host given, and no default",
      `edict HOST ${shownCommand(invocation.command)}, or: default = "HOST" in ${config.file}`,
    )
  const names = word
    .split(",")
    .flatMap((name) => (name.startsWith("@") ? taggedHosts(config, name.slice(1)) : [name]))
  const hosts = [...new Set(names)].map((name) => hostNamed(config, name, { invocation, env }))
  return hosts.filter(
    (host, at) =>
      hosts.findIndex(
        (other) =>
          other.destination === host.destination && other.sshOptions.join(" ") === host.sshOptions.join(" "),
      ) === at,
  )
}

/** Names of the hosts with a tag; every host has the tag "all". */
function taggedHosts(config: Config, tag: string): string[] {
  const names = Object.keys(config.hosts).filter(
    (name) => tag === "all" || config.hosts[name]!.tags.includes(tag),
  )
  if (names.length > 0) return names
  const tags = [...new Set(Object.values(config.hosts).flatMap((host) => host.tags))]
  const close = nearest(tag, tags)
  throw new UsageError(
    `no host in ${config.file} has the tag ${shown(tag)}${tags.length > 0 ? `; there are ${tags.join(", ")}` : ""}`,
    close ? `edict @${close} …` : `tags = ["${tag}"] in a [hosts.NAME] table`,
  )
}

/** One host: by its name in the config, else as an address. */
function hostNamed(
  config: Config,
  word: string,
  given: { invocation: Pick<Invocation, "options">; env: Env },
): Host {
  const { invocation, env } = given
  const settings = Object.hasOwn(config.hosts, word) ? config.hosts[word]! : hostConfig({})
  const address = parseAddress(settings.address ?? word)
  const known =
    settings.hostKey === undefined
      ? undefined
      : path.join(cacheDirectory(env), `known_hosts-${hash(`${word} ${settings.hostKey}`).slice(0, 16)}`)
  const alias = address.destination.replace(/^.*@/, "")
  return {
    name: word,
    destination: address.destination,
    sshOptions: [
      ...invocation.options.sshOptions,
      ...(address.port ? ["-p", address.port] : []),
      ...settings.sshOptions.map((option) => option.replace(/^~(?=\/)/, homeOf(env))),
      ...(settings.forwardAgent ? ["-A"] : []),
      ...(known ? hostKeyOptions(known, alias) : []),
    ],
    knownHosts: known ? { file: known, line: `${alias} ${settings.hostKey!}\n` } : undefined,
    directory: (settings.directory ?? DEFAULT_DIRECTORY).replace(/^~\//, "").replace(/\/+$/, ""),
    env: settings.env,
    requireSignatures: settings.requireSignatures,
    import: settings.import,
    compress: settings.compress,
    substitute: settings.substitute,
    sendInputs: settings.sendInputs,
    systems: settings.systems,
    features: settings.features,
    mandatoryFeatures: settings.mandatoryFeatures,
    speed: settings.speed,
    tags: settings.tags,
  }
}

/** Makes ssh take the one host key in a file, and no other. */
function hostKeyOptions(file: string, alias: string): string[] {
  const word = /\s/.test(file) ? `"${file}"` : file
  const settings = [
    `UserKnownHostsFile=${word.replaceAll("%", "%%")}`,
    "GlobalKnownHostsFile=/dev/null",
    `HostKeyAlias=${alias}`,
    "StrictHostKeyChecking=yes",
    "UpdateHostKeys=no",
  ]
  return settings.flatMap((setting) => ["-o", setting])
}

function isAddress(word: string): boolean {
  try {
    parseAddress(word)
    return true
  } catch {
    return false
  }
}

/**
 * `[user@]host`, `ssh://[user@]host[:port]` or `ssh-ng://…` → what ssh takes.
 * A leading `-` (an option for ssh, CVE-2017-1000117) and characters that could reach a shell through
 * ProxyCommand's %h (CVE-2023-51385) are refused.
 */
export function parseAddress(word: string): { destination: string; port?: string } {
  const refuse = (why: string) =>
    new UsageError(
      `host ${shown(word)} ${why}`,
      "a host is [user@]host, an alias of ssh_config, or ssh://[user@]host[:port]",
    )
  const url = /^ssh(?:-ng)?:\/\/([^/?]*)\/?(?:\?.*)?$/s.exec(word)
  const authority = url ? url[1]! : word
  if (authority === "") throw refuse("is empty")
  if (!/^[A-Za-z0-9._@:%+[\]-]+$/.test(authority)) throw refuse("has characters outside [A-Za-z0-9._@:%+[]-]")
  const port = url ? /^(?:.*@)?(?:\[[^\]]*\]|[^:]*):(\d+)$/.exec(authority)?.[1] : undefined
  const bare = port ? authority.slice(0, -port.length - 1) : authority
  const at = bare.lastIndexOf("@")
  const user = at < 0 ? "" : bare.slice(0, at)
  const name = bare.slice(at + 1).replace(/^\[(.*)\]$/, "$1")
  if (user.startsWith("-") || name.startsWith("-")) throw refuse("starts with -")
  if (name === "" || (at >= 0 && user === "")) throw refuse("lacks a name")
  return { destination: at < 0 ? name : `${user}@${name}`, port }
}
// ── 6. Scan: which words of the command name something here ─────────────────────────────────────────────
// By position and grammar, as Nix parses its command line; the file system is asked for symbolic links only.

type PathSlot = "in" | "out" | "inout" | "profile"
export type ReferenceKind = "flake" | "file" | "store-link" | `path-${PathSlot}`

/** One word of the command, or the end of one, that names something on this machine. */
export type Reference = Readonly<{
  index: number // position among the words after the program name, from 0
  word: string // as typed
  kind: ReferenceKind
  prefix: string // what stands before it inside the word: "-f" of "-f./x", "nixpkgs=" of a lookup path
  scheme: string // "", "path:", "git+file:", "tarball+file:", …, without authority
  path: string // the local path as Nix sees it: percent-decoded in URLs, never in plain paths; "." if empty
  query: string // "?dir=x" as typed, or ""
  suffix: string // "#fragment^outputs" as typed, or ""
  search: "upwards" | "exact" // whether Nix looks for flake.nix in the parents too
  target?: string // of a store-link: the store path it leads to
}>

/** What a Nix command line says about this machine. */
export type Scan = Readonly<{
  command: string // "build", "env shell" (the current names), "nix-build"; "" if unknown
  references: readonly Reference[]
  implicit: "none" | "flake" | "file" // the default that applies: "." or ./default.nix (./shell.nix)
  insertAt: number // where a word can be inserted that spells out that default; -1 if nowhere
  updatePositional: readonly number[] // of `flake update`: a flake before Nix 2.19, names of inputs since
  outLink: Readonly<{ index: number; path: string }> | "default" | "none" // prefix of the result links
  stdin: boolean // whether more installables come from standard input
  system?: string // asked for by an option, else the first that an attribute path names
}>

/**
 * What Nix takes a word for. Flake references come in variants: "ref^" may end in outputs, "ref!" is taken
 * without a search, "ref/" must be absolute, "ref?" may be left out ("default" marks that it was). "file" is
 * an expression file, "lookup" an entry of the lookup path, "update" a positional of `flake update`, "link" a
 * link to a store path, "link/" the same if it contains a slash, "rest" this and every later word.
 */
type FlakeSlot =
  "installable" | "attribute" | "ref" | "ref^" | "ref!" | "ref/" | "ref?" | "default" | "update"
type Slot = PathSlot | FlakeSlot | "file" | "keep" | "link" | "link/" | "lookup" | "rest"
type Command = Readonly<{ fallback: Scan["implicit"]; first: readonly Slot[]; more: Slot }>

type Piece = Readonly<{ index: number; prefix: string; text: string }>

/** A word in its place: a positional (option ""), an option (nth -1), or the nth argument of an option. */
type Token = Piece & Readonly<{ option: string; nth: number; slot: Slot }>
type Line = Readonly<{ command: string; end: number; tokens: readonly Token[] }>
type Look = (path: string) => string | undefined
type Found = Omit<Reference, "index" | "word" | "prefix"> & Readonly<{ prefix?: string }>

const split = (names: string): string[] => names.split(/,\s+/)

/** A table from lists of slots to names, turned around. */
const byName = (table: Readonly<Record<string, string>>): [name: string, slots: string[]][] =>
  Object.entries(table).flatMap(([key, names]) => {
    const slots = key === "" ? [] : key.split(" ")
    return split(names.trim()).map((name): [string, string[]] => [name, slots])
  })

/**
 * The positionals of every command of Nix 2.4 to 2.36 and Lix: the default for none, the first ones, and what
 * all further ones are. A legacy program is a command too; "PROGRAM OPTION" is one whose option changes them.
 */
const commandTable = {
  "flake installable": `
    build, copy, derivation show, env shell, path-info, profile add, realisation info,
    store build-trace info, store copy-log, store copy-sigs, store delete, store dump-path,
    store make-content-addressed, store repair, store sign, store verify`,
  "flake installable keep": "bundle, develop, edit, eval, log, print-dev-env, run, search",
  "flake ref keep": `
    flake archive, flake check, flake clone, flake lock, flake metadata, flake prefetch,
    flake prefetch-inputs, flake show`,
  "flake update": "flake update",
  "flake keep": "fmt, formatter build, formatter run",
  "file file": "nix-build, nix-shell, nix-instantiate",
  "file keep": "nixos-rebuild --attr, nixos-rebuild -A", // without --file: of ./default.nix
  "none installable": "repl",
  "none installable installable keep": "store diff-closures, why-depends",
  "none ref/": "registry add, registry pin, registry remove, registry resolve",
  "none in": "hash file, hash path, nix-hash, nix-store --add",
  "none in keep": `
    nar cat, nar dump-path, nar ls, nar pack, store add, store add-file, store add-path, nix-store --dump`,
  "none keep in": "nix-store --add-fixed",
  "none out keep": "flake new, nix-store --restore",
  "none keep out": "nix-store --generate-binary-cache-key",
  "none profile keep": "nix-env --switch-profile, nix-env -S",
  "none link/": "nix-env",
  "none keep link": "nix-copy-closure",
  "none link": `
    nix-store --realise, nix-store --realize, nix-store -r, nix-store --query, nix-store -q,
    nix-store --delete, nix-store --verify-path, nix-store --repair-path, nix-store --read-log,
    nix-store -l, nix-store --export, nix-store --print-env, nix-store --dump-db`,
  "none keep": `
    config check, config show, daemon, derivation add, describe-stores, flake init, hash convert,
    hash to-base16, hash to-base32, hash to-base64, hash to-sri, help, help-stores,
    key convert-secret-to-public, key generate-secret, profile diff-closures, profile history, profile list,
    profile remove, profile rollback, profile upgrade, profile wipe-history, registry list,
    store build-trace delete, store cat, store gc, store info, store ls, store optimise,
    store path-from-hash-part, store prefetch-file, store roots-daemon, store submit-output, upgrade-nix,
    version, nix-channel, nix-collect-garbage, nix-daemon, nix-prefetch-url, nix-store, nixos-rebuild,
    darwin-rebuild, home-manager, nix-build --expr, nix-build -E, nix-build -, nix-shell --expr,
    nix-shell -E, nix-shell -, nix-shell --packages, nix-shell -p, nix-instantiate --expr,
    nix-instantiate -E, nix-instantiate -, nix-instantiate --find-file, nix-hash --to-base16,
    nix-hash --to-base32, nix-hash --to-base64, nix-hash --to-sri`,
}
const commands: ReadonlyMap<string, Command> = new Map(
  byName(commandTable).map(([name, slots]) => {
    const [fallback, ...positionals] = slots as [Scan["implicit"], ...Slot[]]
    return [name, { fallback, first: positionals.slice(0, -1), more: positionals.at(-1) ?? "keep" }]
  }),
)

/** Older names of commands, which Nix itself rewrites (main.cc of Nix 2.36). */
const aliases: ReadonlyMap<string, string> = new Map(
  split(`add-to-store=store add-path, cat-nar=nar cat, cat-store=store cat, copy-sigs=store copy-sigs,
    dev-shell=develop, diff-closures=store diff-closures, doctor=config check, dump-path=store dump-path,
    flake info=flake metadata, hash-file=hash file, hash-path=hash path, ls-nar=nar ls, ls-store=store ls,
    make-content-addressable=store make-content-addressed, optimise-store=store optimise,
    ping-store=store info, profile install=profile add, shell=env shell, show-config=config show,
    show-derivation=derivation show, sign-paths=store sign, store optimize=store optimise,
    store ping=store info, to-base16=hash to-base16, to-base32=hash to-base32, to-base64=hash to-base64,
    verify=store verify`).map((pair) => pair.split("=") as [string, string]),
)

/**
 * The options that take words (Nix 2.4 to 2.36 and Lix; no option ever changed its arity); all others take
 * none. Long ones mean the same everywhere; "COMMAND OPTION" is an exception, "legacy" stands for all nix-*
 * programs, "rebuild" for nixos-rebuild and its kin.
 */
const optionTable = {
  keep: `
    --algo, --apply, --arg-from-stdin, --eval-store, --exclude, -e, --expected-hash, --expr, --format, --from,
    --hash-algo, --hash-type, -j, --json-format, --keep, -k, --keep-env-var, --key-name, --log-format, --max,
    --mode, --modulo, --name, -n, --nix-store-paths-url, --older-than, --phase, --priority, --regex,
    --sigs-needed, --store-path, --substituter, store copy-sigs -s, store verify -s, --to, --type, --unset,
    -u, --unset-env-var, --update-input, legacy --attr, legacy -A, legacy --command,
    legacy --delete-older-than, legacy --drv-link, legacy -j, legacy --max-atime, legacy --max-freed,
    legacy --max-links, legacy --run, legacy --system-filter, rebuild --attr, rebuild -A, rebuild -b,
    rebuild --build-host, rebuild -c, rebuild -G, rebuild --image-variant, rebuild -j, rebuild -p,
    rebuild --profile-name, rebuild --specialisation, rebuild --switch-generation, rebuild --target-host`,
  "keep keep": "--arg, --argstr, --option, --set-env-var, -s",
  "keep in": "--arg-from-file",
  in: "--key-file, --reference-lock-file, --references-list-json, store sign -k, nix-env --from-profile",
  out: `
    --dest, --eval-profile-file, flake clone -f, --json-log-path, --out-link, -o, --output-lock-file,
    --socket-path, --write-to, legacy --add-root, legacy -o`,
  inout: "--registry",
  profile: "--profile, -p, nix-env -p",
  file: "--file, -f, nix-env -f, rebuild -f",
  lookup: "--include, -I, legacy -I, rebuild -I",
  ref: "--flake, --inputs-from, --template, -t",
  "ref?": "rebuild --flake",
  "ref^": "--bundler, -B",
  "ref ref": "--override-flake",
  "keep ref!": "--override-input",
  "installable out": "--redirect",
  rest: "--command, -c",
  "": `
    copy -s, path-info -s, legacy --expr, nix-env --attr, nix-env -A, nix-copy-closure --from,
    nix-copy-closure --to`,
}
const options: ReadonlyMap<string, readonly Slot[]> = new Map(byName(optionTable) as [string, Slot[]][])

/** The settings of nix.conf that have a value, all of them options too (Nix 2.4 to 2.36 and Lix). */
const valuedSettings: ReadonlySet<string> = new Set(
  `access-tokens allowed-impure-host-deps allowed-uris allowed-users bash-prompt bash-prompt-prefix
    bash-prompt-suffix binary-cache-public-keys binary-caches binary-caches-parallel-connections
    build-chroot-dirs build-cores build-dir build-hook build-hook-kill-timeout build-max-jobs
    build-max-log-size build-max-silent-time build-poll-interval build-repeat build-sandbox-paths
    build-timeout build-users-group builders builtin-builder-sandbox-paths commit-lock-file-summary
    commit-lockfile-summary connect-timeout cores diff-hook download-attempts download-buffer-size
    download-speed eval-attrset-update-layer-rhs-threshold eval-profiler eval-profiler-frequency eval-system
    experimental-features external-builders filetransfer-retry-attempts filetransfer-retry-delay
    filetransfer-retry-delay-rate-limited filetransfer-retry-max-delay flake-registry gc-reserved-space
    hashed-mirrors http-connections id-count ignored-acls impure-env lint-absolute-path-literals
    lint-short-path-literals lint-url-literals log-lines max-build-log-size max-call-depth max-free max-jobs
    max-silent-time max-substitution-jobs min-free min-free-check-interval nar-buffer-size
    narinfo-cache-meta-ttl narinfo-cache-negative-ttl narinfo-cache-positive-ttl netrc-file nix-path
    pasta-path plugin-files post-build-hook pre-build-hook repeat repl-overlays sandbox-build-dir
    sandbox-dev-shm-size sandbox-paths secret-key-files ssl-cert-file stalled-download-timeout start-id
    store substituters substitution-max-jobs system system-features tarball-ttl temp-dir timeout
    trusted-binary-caches trusted-public-keys trusted-substituters trusted-users upgrade-nix-store-path-url
    user-agent-suffix warn-large-path-threshold`.split(/\s+/),
)

const rebuilders: ReadonlySet<string> = new Set(["nixos-rebuild", "darwin-rebuild", "home-manager"])
const programs: ReadonlySet<string> = new Set([
  ...rebuilders,
  ...split(`nix, nix-build, nix-channel, nix-collect-garbage, nix-copy-closure, nix-daemon, nix-env, nix-hash,
    nix-instantiate, nix-prefetch-url, nix-shell, nix-store, nixos-rebuild-ng, nom, nom-build, nom-shell`),
])

/** The commands that make result links unasked (`bundle` under the name of the derivation). */
const linkingCommands: ReadonlySet<string> = new Set(
  split(`build, bundle, formatter build, nix-build, nixos-rebuild build, nixos-rebuild build-image,
    nixos-rebuild build-vm, nixos-rebuild build-vm-with-bootloader, nixos-rebuild dry-activate,
    nixos-rebuild test, darwin-rebuild build, darwin-rebuild check, home-manager build`),
)

// The grammar of flake references, from Nix 2.36 (flakeref.cc, url-parts.hh, outputs-spec.cc, path.cc).
const id = "[a-zA-Z][a-zA-Z0-9_-]*"
const urlCharacter = String.raw`[\w.~!$&'"()*+,;=:@/-]|%[0-9a-fA-F]{2}`
const wellFormed = new RegExp(`^(${urlCharacter})*$`)
const registryEntry = new RegExp(String.raw`^${id}(/[a-zA-Z0-9@][\w./@+-]*)?(#(${urlCharacter}|[? ^])*)?$`)
const inputPath = new RegExp(`^${id}(/${id})*$`)
const plainReference = /^([^?#]*)(\?[^#]*)?(#.*)?$/s
const urlReference = /^([a-z][a-z0-9+.-]*:)([^?#]*)(\?[^#]*)?(#.*)?$/s
const withOutputs = /^(.*)(\^(?:\*|[\w+.?=-]+(?:,[\w+.?=-]+)*))$/s
const storePath = /^\/nix\/store\/[0-9a-df-np-sv-z]{32}-[\w+.?=-]+(?=[/^]|$)/
const localSchemes: ReadonlyMap<string, "flake" | "file"> = new Map([
  ...["path:", "git+file:", "hg+file:"].map((scheme): [string, "flake"] => [scheme, "flake"]),
  ...["file:", "file+file:", "tarball+file:"].map((scheme): [string, "file"] => [scheme, "file"]),
])
const systemOutputs =
  "packages|legacyPackages|checks|devShells?|apps|bundlers|formatter|defaultPackage|defaultApp"
const systemName = String.raw`\w+-(?:linux|darwin|cygwin|\w*bsd)`
const systemAttribute = new RegExp(String.raw`^\.?(?:${systemOutputs})\."?(${systemName})"?(?=[.^]|$)`)

/**
 * Whether a word is a program of the Nix family. As the first word after the host it is then the program to
 * run; any other word there is a flake reference, short for `nix run`.
 */
export function isNixProgram(word: string): boolean {
  return programs.has(word)
}

const isNom = (program: string): boolean => /^nom(-|$)/.test(program)

/**
 * Classifies the words after `program` by position and grammar, as Nix 2.19 and later do; what 2.4 to 2.18
 * read differently they mostly refuse. `look` answers the text of a symlink, undefined for anything else; it
 * gets paths as typed, relative to the directory of the command.
 */
export function scan(program: string, words: readonly string[], look: Look): Scan {
  const line = readLine(program, words)
  const command = commandOf(line)
  const given = new Set(line.tokens.map((token) => token.option))
  const nothing: Scan = {
    command: command ? line.command : "",
    references: [],
    implicit: "none",
    insertAt: -1,
    updatePositional: [],
    outLink: "none",
    stdin: false,
  }
  if (!command || given.has("--help") || given.has("--version")) return nothing

  const tokens = place(line, command)
  const positionals = tokens.filter((token) => token.option === "").map((token) => token.index)
  const system = systemOf(tokens)
  return {
    ...nothing,
    ...defaultOf(line, command, tokens),
    references: tokens.flatMap((token) => referenceOf(token, words, look)),
    updatePositional: command.more === "update" && !given.has("--flake") ? positionals : [],
    outLink: outLinkOf(line.command, tokens),
    stdin: given.has("--stdin"),
    ...(system === undefined ? {} : { system }),
  }
}

/** Splits the words into subcommand, options, arguments and positionals (args.cc of Nix). */
function readLine(program: string, words: readonly string[]): Line {
  const name = program.replace(/^nom(?=-|$)/, "nix").replace(/-ng$/, "")
  const queue: Piece[] = words.map((text, index) => ({ index, prefix: "", text }))
  const tokens: Token[] = []
  let command = name === "nix" ? "" : name
  let end = 0
  // The first `--` ends the options, not the positionals: `nix run -- .#x` runs .#x.
  let areOptionsOver = false
  for (let piece = queue.shift(); piece; piece = queue.shift()) {
    if (areOptionsOver || !piece.text.startsWith("-")) {
      if (commands.has(command)) tokens.push({ ...piece, option: "", nth: 0, slot: "keep" })
      else {
        const longer = `${command} ${piece.text}`.trim()
        command = aliases.get(longer) ?? longer
        end = piece.index + 1
      }
    } else if (piece.text === "--") {
      areOptionsOver = true
    } else {
      const [option = piece, ...attached] = expand(piece, name)
      queue.unshift(...attached)
      tokens.push({ ...option, option: option.text, nth: -1, slot: "keep" })
      tokens.push(...takeArguments(option, queue, command))
    }
  }
  return { command, end, tokens }
}

/** "-Lvj3" is short for "-L -v -j 3". "--flake=x" is understood by the rebuilders, never by Nix. */
function expand(piece: Piece, program: string): Piece[] {
  const { index, text } = piece
  const [, long, value = ""] = (rebuilders.has(program) && /^(--[^=]+)=(.*)$/s.exec(text)) || []
  if (long !== undefined) {
    return [
      { index, prefix: "", text: long },
      { index, prefix: `${long}=`, text: value },
    ]
  }
  const [prefix, letters] = /^-([a-zA-Z]+)/.exec(text) ?? []
  if (prefix === undefined || letters === undefined || text.length === 2) return [piece]
  const rest = text === prefix ? [] : [{ index, prefix, text: text.slice(prefix.length) }]
  return [...Array.from(letters, (letter) => ({ index, prefix: "", text: `-${letter}` })), ...rest]
}

/** Takes the arguments of `option` off the front of `queue`. */
function takeArguments(option: Piece, queue: Piece[], command: string): Token[] {
  return slotsOf(option.text, command).flatMap((slot, nth): Token[] => {
    if (slot === "rest") queue.length = 0
    const isLeftOut = slot === "ref?" && (queue[0]?.text ?? "-").startsWith("-")
    if (isLeftOut) return [{ ...option, option: option.text, nth, slot: "default" }]
    const piece = queue.shift()
    return piece ? [{ ...piece, option: option.text, nth, slot: slot === "ref?" ? "ref" : slot }] : []
  })
}

function slotsOf(option: string, command: string): readonly Slot[] {
  const family = rebuilders.has(command) ? "rebuild" : command.startsWith("nix-") ? "legacy" : ""
  const isLong = option.startsWith("--")
  // The letters of `nix` mean nothing to the other programs, its long options mostly the same.
  const shared = isLong || family === "" ? options.get(option) : undefined
  const isSetting = isLong && (option.startsWith("--extra-") || valuedSettings.has(option.slice(2)))
  const own = options.get(`${command} ${option}`) ?? options.get(`${family} ${option}`)
  return own ?? shared ?? (isSetting ? ["keep"] : [])
}

/** The table entry of a command: that of an option that changes its positionals, if there is one. */
function commandOf({ command, tokens }: Line): Command | undefined {
  const changed = tokens.map((token) => commands.get(`${command} ${token.option}`)).find((entry) => entry)
  return changed ?? commands.get(command)
}

/** Gives the positionals their slots. */
function place({ tokens }: Line, command: Command): Token[] {
  // --file and --expr, wherever they stand, make all installables attribute paths.
  const isFile = tokens.some(({ option, slot }) => option === "--expr" || (option !== "" && slot === "file"))
  const isNewUpdate = tokens.some(({ option }) => option === "--flake")
  let count = 0
  return tokens.map((token) => {
    const slot = token.option === "" ? (command.first[count++] ?? command.more) : token.slot
    if (slot === "installable" && isFile) return { ...token, slot: "attribute" }
    // What is no name of an input can only be the flake that Nix before 2.19 expects here.
    const isInput = isNewUpdate || inputPath.test(token.text)
    if (slot === "update") return { ...token, slot: isInput ? "keep" : "ref" }
    return { ...token, slot }
  })
}

type Default = Pick<Scan, "implicit" | "insertAt">

function defaultOf(line: Line, command: Command, tokens: readonly Token[]): Default {
  const leftOut = tokens.find((token) => token.slot === "default")
  if (leftOut) return { implicit: "flake", insertAt: leftOut.index + 1 }
  const replacing = ["--all", "--expr", "--flake", "--stdin"]
  const isNamed = tokens.some(({ option, slot }) =>
    option === "" ? slot !== "keep" : slot === "file" || replacing.includes(option),
  )
  if (isNamed || command.fallback === "none") return { implicit: "none", insertAt: -1 }
  const takesWord = ["installable", "ref", "file"].includes(command.first[0] ?? command.more)
  return { implicit: command.fallback, insertAt: takesWord ? line.end : -1 }
}

function outLinkOf(command: string, tokens: readonly Token[]): Scan["outLink"] {
  if (tokens.some((token) => token.option === "--dry-run")) return "none"
  const naming = ["-o", "--out-link", "--add-root"]
  const last = tokens.findLast(({ option, nth }) =>
    nth === 0 ? naming.includes(option) : option === "--no-link" || option === "--no-out-link",
  )
  if (last) return last.slot === "out" && last.text !== "" ? { index: last.index, path: last.text } : "none"
  const action = tokens.find((token) => token.option === "")?.text ?? ""
  return linkingCommands.has(command) || linkingCommands.has(`${command} ${action}`) ? "default" : "none"
}

function systemOf(tokens: readonly Token[]): string | undefined {
  const set = tokens.findLast(({ option, nth }, at) => {
    if (option === "--option") return nth === 1 && tokens[at - 1]?.text === "system"
    return option === "--system" && nth === 0
  })
  if (set) return set.text
  for (const { option, slot, text } of tokens) {
    if (option !== "" || (slot !== "installable" && slot !== "attribute")) continue
    const attribute = slot === "attribute" ? text : decode(/#(.*)$/s.exec(text)?.[1] ?? "")
    const [, system] = systemAttribute.exec(attribute) ?? []
    if (system !== undefined) return system
  }
  return undefined
}

function referenceOf(token: Token, words: readonly string[], look: Look): Reference[] {
  const { index, prefix, text, slot } = token
  const word = words[index] ?? ""
  // `-fx` gives `-f` the argument "-x", which no part of the word spells: nothing to replace.
  const found = word === prefix + text ? readers[slot]?.(text, look) : undefined
  return found ? [{ index, word, ...found, prefix: prefix + (found.prefix ?? "") }] : []
}

/** How the words of each slot are read; those of other slots name nothing here. */
const readers: Readonly<Partial<Record<Slot, (text: string, look: Look) => Found | undefined>>> = {
  in: (text) => readPath("path-in", text),
  out: (text) => readPath("path-out", text),
  inout: (text) => readPath("path-inout", text),
  profile: (text) => readPath("path-profile", text),
  file: readFile,
  lookup: readLookup,
  link: (text, look) => readLink(text, "", look),
  "link/": (text, look) => (text.includes("/") ? readLink(text, "", look) : undefined),
  installable: readInstallable,
  ref: (text) => readFlake(text, ""),
  "ref^": (text) => readFlake(...splitOutputs(text)),
  "ref/": readAbsoluteFlake,
  "ref!": (text) => exactly(readFlake(text, "")),
}

const plain = (kind: ReferenceKind, text: string): Found => {
  return { kind, scheme: "", path: text || ".", query: "", suffix: "", search: "exact" }
}

const readPath = (kind: ReferenceKind, text: string): Found | undefined =>
  text === "" ? undefined : plain(kind, text)

const exactly = (found: Found | undefined): Found | undefined => found && { ...found, search: "exact" }

function splitOutputs(text: string): [rest: string, outputs: string] {
  const [, rest = text, outputs = ""] = withOutputs.exec(text) ?? []
  return [rest, outputs]
}

/** A word with a slash may be a store path or lead to one (installables.cc); otherwise it is a flake. */
function readInstallable(text: string, look: Look): Found | undefined {
  const [rest, outputs] = splitOutputs(text)
  if (rest.includes("/") && storeTarget(rest, look) !== undefined) return readLink(rest, outputs, look)
  return readFlake(rest, outputs)
}

/** A link into the store; a store path itself is left alone. */
function readLink(text: string, outputs: string, look: Look): Found | undefined {
  const target = storeTarget(text, look)
  if (target === undefined || storePath.test(path.normalize(text))) return undefined
  return { ...plain("store-link", text), suffix: outputs, target }
}

/** Follows the last component, never a directory above it (followLinksToStore of Nix). */
function storeTarget(text: string, look: Look): string | undefined {
  let place = path.normalize(text).replace(/(?<=.)\/$/, "")
  for (let hops = 0; hops < 40; hops++) {
    const [target] = storePath.exec(place) ?? []
    if (target !== undefined) return target
    const link = look(place)
    if (link === undefined) return undefined
    place = path.isAbsolute(link) ? path.normalize(link) : path.join(path.dirname(place), link)
  }
  return undefined
}

/** A flake reference: an entry of the registry first, then a URL, then a path, whatever exists here. */
function readFlake(text: string, outputs: string): Found | undefined {
  if (registryEntry.test(text)) return undefined
  const [, scheme, place = "", query = "", fragment = ""] = urlReference.exec(text) ?? []
  if (scheme !== undefined) {
    const kind = localSchemes.get(scheme)
    const hasAuthority = /^\/\/(?!\/)/.test(place)
    if (kind === undefined || hasAuthority) return undefined
    const local = decode(place.replace(/^\/\//, ""))
    // Nix takes a malformed URL for a path.
    if (wellFormed.test(place)) return { ...plain(kind, local), scheme, query, suffix: fragment + outputs }
  }
  const [, directory = "", parameters = "", rest = ""] = plainReference.exec(text) ?? []
  return { ...plain("flake", directory), query: parameters, suffix: rest + outputs, search: "upwards" }
}

/** Where Nix has no directory to start from, a relative path is an error. */
function readAbsoluteFlake(text: string): Found | undefined {
  const flake = readFlake(text, "")
  return flake && path.isAbsolute(flake.path) ? flake : undefined
}

/** The argument of --file, or what the legacy programs evaluate: mostly a path (lookupFileArg of Nix). */
function readFile(text: string, look: Look): Found | undefined {
  if (text === "" || text === "-" || /^<.+>$/s.test(text)) return undefined
  // A derivation is built, not evaluated.
  const isDerivation = storeTarget(text, look)?.endsWith(".drv") ?? false
  return isDerivation ? readLink(text, "", look) : readSource(text)
}

/** An entry of the lookup path: [NAME=]SOURCE. */
function readLookup(text: string): Found | undefined {
  const name = text.slice(0, text.indexOf("=") + 1)
  const found = readSource(text.slice(name.length))
  return found && { ...found, prefix: name + (found.prefix ?? "") }
}

function readSource(text: string): Found | undefined {
  if (text.startsWith("flake:")) {
    const flake = readAbsoluteFlake(text.slice("flake:".length))
    return flake && { ...flake, prefix: "flake:" }
  }
  if (text.startsWith("file://")) return readFlake(text, "")
  const isRemote = text === "" || /^(channel:|(https?|channel|git|s3|ssh):\/\/)/.test(text)
  return isRemote ? undefined : plain("path-in", text)
}

function decode(text: string): string {
  try {
    return decodeURIComponent(text)
  } catch {
    return text
  }
}
// ── 7. Trees and map: scan + file system → Plan ─────────────────────────────────────────────────────────
// Trees keep their absolute path below one root over there, so that relative references between them stay
// true, and the command runs in the mirrored current directory. Words are rewritten only where they must be.

type Needed = Readonly<{
  local: string
  kind: Tree["kind"]
  history: Tree["history"]
  flakeDirectory?: string
  only?: string
}>

/**
 * Looks up what the command's references name here and decides everything that is to be done. `slot` is 0, or more
 * where other runs hold the trees of the slots before it.
 */
export function makePlan(
  invocation: Invocation,
  where: { host: Host; cwd: string; slot: number; env: Env },
): Plan {
  const { options, command } = invocation
  const { host, cwd } = where
  const [program, ...words] = command
  const scanned = scan(program!, words, linkText)
  const needs = scanned.references.map((reference) => ({
    reference,
    needed: findTree(reference, { scanned, cwd }),
  }))
  const implicit = scanned.implicit === "none" ? undefined : neededByDefault(scanned, cwd)
  const flakes = needs.filter(({ reference }) => reference.kind === "flake").map(({ needed }) => needed)
  const passed = [...flakes, scanned.implicit === "flake" ? implicit : undefined]
  const isInside = passed.some((flake) => flake !== undefined && isWithin(cwd, flake.local))
  const stateful = options.sync === "always" || (options.sync === "auto" && isInside)
  const repository = gitRootOf(cwd)
  const here: Needed = { local: repository ?? cwd, kind: repository ? "git" : "directory", history: "head" }
  const root = clientRoot(where)
  const named = [...needs.map(({ needed }) => needed), implicit, options.sync === "always" ? here : undefined]
  const trees = makeTrees(
    named.filter((item) => item !== undefined),
    { root, stateful, options },
  )
  const map: Mapping = { cwd, place: (local) => placeIn(trees, root, local) }
  const mapped = needs.map(({ reference, needed }) => ({
    reference,
    word: mapReference(reference, needed, map),
  }))
  const rewritten = rewriteCommand(program!, words, { scanned, mapped, implicit, map })
  const comesHome = (local: string) =>
    trees.some((tree) => tree.comesHome === "all" && isWithin(local, tree.local))
  return {
    host,
    options,
    stateful,
    implicit: scanned.implicit === "flake",
    references: mapped.map(asPlanned),
    trees,
    cwd: { local: cwd, remote: map.place(cwd) },
    linkDirectories: linkDirectories(scanned, cwd)
      .filter((local) => !comesHome(local))
      .map((local) => ({ local, remote: map.place(local) })),
    linkPrefix: typeof scanned.outLink === "object" ? path.basename(scanned.outLink.path) : "result",
    storePaths: scanned.references.flatMap((reference) => reference.target ?? []),
    inputs: inputsToSend(
      passed.flatMap((flake) => flake?.flakeDirectory ?? []),
      host,
    ),
    settings: secretSettings(program!, words).map(({ line }) => line),
    ...underNom(withLink(rewritten, { scanned, options, host })),
    root,
    seed: where.slot === 0 ? "" : clientRoot({ ...where, slot: 0 }),
    system: scanned.system,
  }
}

/** The plan for the first slot whose trees no other run holds, and the locks that keep it so. */
function takeFreeSlot(
  invocation: Invocation,
  where: { host: Host; cwd: string; env: Env },
): { plan: Plan; locks: readonly number[] } {
  for (let slot = 0; ; slot++) {
    const plan = makePlan(invocation, { ...where, slot })
    const locks = lockAll(
      [plan.cwd.remote, ...plan.trees.map(({ remote }) => remote)].map((remote) =>
        path.join(
          stateDirectory(where.env),
          "locks",
          hash(`${where.host.destination} ${remote}`).slice(0, 24),
        ),
      ),
    )
    if (locks) return { plan, locks }
  }
}

/** The text of a symbolic link, or undefined where there is none. */
function linkText(file: string): string | undefined {
  try {
    return fs.readlinkSync(file)
  } catch {
    return undefined
  }
}

const shownKind = (kind: ReferenceKind): string =>
  kind === "path-inout" || kind === "path-profile" ? "path-out" : kind

/** A reference and the word for it over there, as the plan shows them. */
const asPlanned = ({ reference, word }: { reference: Reference; word: RemoteWord }): MappedReference => ({
  index: reference.index,
  word: withoutSecret(reference.word),
  kind: shownKind(reference.kind),
  rewritten: withoutSecret(plainWord(word)),
})

/** The tree that one reference needs. Throws EdictError for what is not there. */
function findTree(reference: Reference, at: { scanned: Scan; cwd: string }): Needed | undefined {
  const { scanned, cwd } = at
  const isLinkPrefix = typeof scanned.outLink === "object" && scanned.outLink.index === reference.index
  if (reference.kind === "store-link" || isLinkPrefix) return undefined
  const typed = path.resolve(cwd, reference.path)
  if (reference.kind === "path-out") return { local: typed, kind: "output", history: "head" }
  if (reference.kind === "path-profile") return undefined
  if (reference.kind === "path-inout")
    return { local: typed, kind: fs.existsSync(typed) ? "file" : "output", history: "head" }
  if (!fs.existsSync(typed))
    throw new EdictError(
      `${shown(reference.word)}: there is no ${shown(typed)} here`,
      "check the path; a flake of the registry needs no ./ before it",
    )
  const real = fs.realpathSync(typed)
  if (real.startsWith("/nix/store/")) return undefined
  if (reference.kind === "file") return { local: real, kind: "file", history: "head" }
  if (reference.kind === "path-in") return neededInput(real)
  return findFlake(reference, real)
}

/** A local file or directory as input: with the repository it lies in, as Nix files import their neighbours. */
function neededInput(real: string): Needed {
  const directory = fs.statSync(real).isDirectory() ? real : path.dirname(real)
  const repository = gitRootOf(directory)
  if (repository) return { local: repository, kind: "git", history: "head" }
  if (directory === real) return { local: real, kind: "directory", history: "head" }
  const alone = !real.endsWith(".nix") || isWithin(os.homedir(), directory)
  return alone
    ? { local: real, kind: "file", history: "head" }
    : { local: directory, kind: "directory", history: "head" }
}

/** The source tree of a flake reference, by Nix's own search (upwards for flake.nix, then for .git). */
function findFlake(reference: Reference, real: string): Needed {
  const query = new URLSearchParams(reference.query.slice(1))
  const history = query.has("ref") || query.has("rev") ? "full" : "head"
  if (/^(git|hg)\+/.test(reference.scheme)) return { local: real, kind: "git", history, flakeDirectory: real }
  if (reference.scheme !== "")
    return { local: real, kind: "directory", history: "head", flakeDirectory: real }
  const flakeDirectory = reference.search === "upwards" ? searchFlake(real, reference.word) : real
  const repository = gitRootOf(flakeDirectory)
  return repository
    ? { local: repository, kind: "git", history, flakeDirectory }
    : { local: flakeDirectory, kind: "directory", history: "head", flakeDirectory }
}

/** The directory with flake.nix at or above `start`, as Nix searches it: never beyond a .git. */
function searchFlake(start: string, word: string): string {
  const missing = (why: string) =>
    new EdictError(
      `${shown(word)} is no flake: ${why}`,
      "cd into a directory with a flake.nix, or name one: ./DIR#x",
    )
  let directory = fs.statSync(start).isDirectory() ? start : path.dirname(start)
  if (directory !== start && path.basename(start) !== "flake.nix") throw missing(`${shown(start)} is a file`)
  while (!fs.existsSync(path.join(directory, "flake.nix"))) {
    if (fs.existsSync(path.join(directory, ".git")))
      throw missing(`there is no flake.nix in ${shown(start)} or above it, up to ${shown(directory)}`)
    if (directory === path.dirname(directory))
      throw missing(`there is no flake.nix in ${shown(start)} or above it`)
    directory = path.dirname(directory)
  }
  return directory
}

/** The nearest directory at or above `directory` that holds .git (a directory, or a file for a worktree). */
function gitRootOf(directory: string): string | undefined {
  for (let at = directory; ; at = path.dirname(at)) {
    if (fs.existsSync(path.join(at, ".git"))) return at
    if (at === path.dirname(at)) return undefined
  }
}

/** What the default stands for: the flake in `.`, or default.nix / shell.nix of the older programs. */
function neededByDefault(scanned: Scan, cwd: string): Needed | undefined {
  if (scanned.implicit === "flake")
    return findFlake(
      {
        index: -1,
        word: ".",
        kind: "flake",
        prefix: "",
        scheme: "",
        path: ".",
        query: "",
        suffix: "",
        search: "upwards",
      },
      cwd,
    )
  const file = ["shell.nix", "default.nix"]
    .slice(scanned.command === "nix-shell" ? 0 : 1)
    .find((name) => fs.existsSync(path.join(cwd, name)))
  return file ? neededInput(fs.realpathSync(path.join(cwd, file))) : undefined
}

/** One Tree for each place, its locked local inputs with it; what lies in another tree's own files is left to that tree. */
function makeTrees(
  found: readonly Needed[],
  context: { root: string; stateful: boolean; options: Options },
): Tree[] {
  const trees = new Map<string, Tree>()
  const home = context.options.sync === "never" ? "nothing" : context.stateful ? "all" : "lock-file"
  const add = (item: Needed, more: Partial<Tree>) => {
    const before = trees.get(item.local)
    trees.set(item.local, {
      id: "",
      kind: before?.kind === "directory" ? "directory" : item.kind,
      local: item.local,
      remote: remotePath(context.root, item.local),
      history: before?.history === "full" ? "full" : item.history,
      comesHome: item.kind === "output" ? "all" : home,
      ...more,
    })
  }
  for (const item of found) add(item, {})
  for (const item of found)
    for (const input of item.flakeDirectory ? lockedInputs(item.flakeDirectory) : [])
      if (!trees.has(input.local)) add(input, { comesHome: "nothing", input: input.only })
  const all = [...trees.values()].filter(
    (tree) =>
      !(
        tree.kind === "file" &&
        [...trees.values()].some(
          (other) => other !== tree && other.kind === "directory" && isWithin(tree.local, other.local),
        )
      ),
  )
  return all
    .sort((a, b) => (a.local < b.local ? -1 : 1))
    .map((tree) => ({ ...tree, id: hash(`${tree.kind} ${tree.local}`).slice(0, 16) }))
}

/**
 * Inputs locked to absolute directories here (flake.lock, type "path"). Over there they are added to the
 * store as "source": Nix takes a locked input with a narHash from the store if it is valid there.
 */
function lockedInputs(flakeDirectory: string): Needed[] {
  return readLock(flakeDirectory).flatMap(({ locked }) => {
    const local = locked?.type === "path" ? locked.path : undefined
    if (!local?.startsWith("/") || local.startsWith("/nix/store/") || !fs.existsSync(local)) return []
    return [
      { local: fs.realpathSync(local), kind: "directory" as const, history: "head" as const, only: "source" },
    ]
  })
}

/**
 * The locked inputs of flakes that a host may lack: those that no other machine can fetch (local git repositories, and
 * relative paths as Nix before 2.26 locks them), as far as they are in the store here. With send-inputs all others,
 * too, but for those that travel as trees.
 */
function inputsToSend(flakeDirectories: readonly string[], { sendInputs }: Host): LockedInput[] {
  const found = flakeDirectories.flatMap((directory) =>
    readLock(directory).flatMap(({ name, locked, parent }): LockedInput[] => {
      const { type, url, narHash } = locked ?? {}
      const isPath = type === "path"
      const isLocal = isPath
        ? !locked?.path?.startsWith("/") && parent === undefined
        : type === "git" && url?.startsWith("file:")
      if (!locked || !narHash?.startsWith("sha256-")) return []
      const place = sourcePath(narHash)
      const isSent = (sendInputs && !isPath) || (isLocal && fs.existsSync(place))
      return isSent ? [{ name, path: place, locked }] : []
    }),
  )
  return [...new Map(found.map((input) => [input.path, input])).values()]
}

/** Where a source tree with this hash is in the store: named by the first 160 bits, folded, in Nix's base 32. */
export function sourcePath(narHash: string): string {
  const digits = Buffer.from(narHash.slice("sha256-".length), "base64").toString("hex")
  const full = Buffer.from(hash(`source:sha256:${digits}:/nix/store:source`), "hex")
  const folded = Buffer.alloc(20)
  for (const [at, byte] of full.entries()) folded[at % 20]! ^= byte
  const number = BigInt(`0x${folded.reverse().toString("hex")}`)
  const name = Array.from({ length: 32 }, (_, at) => Number((number >> BigInt(5 * (31 - at))) & 31n))
  return `/nix/store/${name.map((digit) => "0123456789abcdfghijklmnpqrsvwxyz"[digit]).join("")}-source`
}

type LockNode = Readonly<{
  name: string
  locked?: Readonly<{ type?: string; path?: string; url?: string; narHash?: string; dir?: string }>
  parent?: unknown
}>

/** The inputs in flake.lock; none where there is none that can be read. */
function readLock(flakeDirectory: string): LockNode[] {
  try {
    const lock = JSON.parse(fs.readFileSync(path.join(flakeDirectory, "flake.lock"), "utf8")) as {
      nodes?: Record<string, Omit<LockNode, "name">>
    }
    return Object.entries(lock.nodes ?? {}).map(([name, node]) => ({ ...node, name }))
  } catch {
    return []
  }
}

/** Where result links may appear: the current directory, and the directories of -o and --profile. */
function linkDirectories(scanned: Scan, cwd: string): string[] {
  const outLink =
    typeof scanned.outLink === "object" ? [path.dirname(path.resolve(cwd, scanned.outLink.path))] : []
  const profiles = scanned.references
    .filter((reference) => reference.kind === "path-profile")
    .map((reference) => path.dirname(path.resolve(cwd, reference.path)))
  return [...new Set([cwd, ...outLink, ...profiles])]
}

/** Where things are on both sides: the current directory, and the remote place of any local path. */
type Mapping = Readonly<{ cwd: string; place: (local: string) => string }>

/** A reference as a word for the other side; untouched where it means the same there. */
function mapReference(reference: Reference, needed: Needed | undefined, map: Mapping): RemoteWord {
  const { kind, prefix, scheme, query, suffix, word } = reference
  if (kind === "store-link") return reference.target! + suffix
  const typed = path.resolve(map.cwd, reference.path)
  const real = fs.existsSync(typed) ? fs.realpathSync(typed) : typed
  if (real.startsWith("/nix/store/")) return typed === real ? word : prefix + scheme + real + query + suffix
  const target = needed?.flakeDirectory ?? (kind === "path-out" || kind === "path-profile" ? typed : real)
  if (kind === "file")
    return { prefix: `${prefix}${scheme}//`, home: map.place(target), suffix: query + suffix }
  const relative = path.relative(map.place(map.cwd), map.place(target)) || "."
  const dotted = relative.startsWith(".") ? relative : `./${relative}`
  const isPlainDirectory = kind === "flake" && scheme === "" && needed?.kind === "directory"
  const spelled = reference.path !== "" && !/^[?#^]/.test(word) && word !== "" && !/^[\w+]+:\/\//.test(word)
  if (spelled && !isPlainDirectory && leadsTo(reference, target, map)) return word
  // Below somebody else's .git over there (a home directory kept in git) a plain path would mean that repository.
  const url = isPlainDirectory ? "path:" : scheme
  return prefix + url + (url === "" ? dotted : encodeURI(dotted)) + query + suffix
}

/** Whether a relative path leads to the same place over there, perhaps by Nix's own search upwards. */
function leadsTo(reference: Reference, target: string, map: Mapping): boolean {
  const typed = path.resolve(map.cwd, reference.path)
  if (path.isAbsolute(reference.path) || (fs.existsSync(typed) && fs.realpathSync(typed) !== typed))
    return false
  if (typed === map.cwd && reference.search === "upwards") return true
  return (
    typed === target &&
    path.relative(map.place(map.cwd), map.place(target)) === path.relative(map.cwd, target)
  )
}

function rewriteCommand(
  program: string,
  words: readonly string[],
  plan: {
    scanned: Scan
    mapped: readonly { reference: Reference; word: RemoteWord }[]
    implicit: Needed | undefined
    map: Mapping
  },
): RemoteWord[] {
  const { scanned, mapped, implicit, map } = plan
  const secret = new Set(secretSettings(program, words).flatMap(({ indices }) => indices))
  const rewritten = words.map((word, index): RemoteWord | undefined => {
    if (secret.has(index)) return undefined
    const other = mapped.find(({ reference }) => reference.index === index)?.word
    // What is no reference is the name of an input.
    return scanned.updatePositional.includes(index) && typeof other === "string"
      ? { update: other }
      : (other ?? word)
  })
  if (scanned.implicit === "flake" && implicit?.kind === "directory" && scanned.insertAt >= 0) {
    const relative = path.relative(map.place(map.cwd), map.place(implicit.flakeDirectory!)) || "."
    rewritten.splice(scanned.insertAt, 0, `path:${encodeURI(relative)}`)
  }
  return [program, ...rewritten.filter((word) => word !== undefined)]
}

/** Settings of Nix whose values are secret. */
const SECRET_SETTING = /^(extra-)?(access-tokens|impure-env)$/

/**
 * The options of a command that set something secret: which words they are, and the line of nix.conf that says the
 * same. On a command line every user of a machine can read them; over there they go into NIX_CONFIG.
 */
export function secretSettings(
  program: string,
  words: readonly string[],
): readonly Readonly<{ indices: readonly number[]; line: string }>[] {
  if (!words.some((word) => SECRET_SETTING.test(word.replace(/^--/, "")))) return []
  const { tokens } = readLine(program, words)
  return tokens.flatMap((token, at) => {
    const isOption = token.option === "--option"
    const own = { ...token, text: token.text.replace(/^--/, "") }
    const [name, value] = isOption ? tokens.slice(at + 1) : [own, tokens[at + 1]]
    if (token.nth !== -1 || !name || !value || !SECRET_SETTING.test(name.text)) return []
    // A line of nix.conf cannot say everything.
    if (value.nth !== (isOption ? 1 : 0) || /[#\r\n]/.test(value.text)) return []
    return [{ indices: [token.index, name.index, value.index], line: `${name.text} = ${value.text}` }]
  })
}

/** Where a result link waits that only --materialize needs: it goes with the run. `run` is the name of the run. */
const linkPlace = (host: Host, run: string): string => `${host.directory}/run/${run}/out`

/** --materialize needs to know what was built: a link in the run's own directory where the command wants none. */
function withLink(
  command: readonly RemoteWord[],
  how: { scanned: Scan; options: Options; host: Host },
): readonly RemoteWord[] {
  const { scanned, options, host } = how
  const end = command.indexOf("--")
  const at = command.findIndex((word) => word === "--no-link" || word === "--no-out-link")
  const makesLinks = scanned.outLink === "none" && linkingCommands.has(scanned.command)
  if (options.materialize === undefined || !makesLinks || at < 0 || (end >= 0 && end < at)) return command
  const link = { prefix: "", home: `${linkPlace(host, "RUN")}/result`, suffix: "", of: "run" } as const
  return command.toSpliced(at, 1, "--out-link", link)
}

/**
 * What runs for a command of nom, as nom 2.1 does it (exe/Main.hs): `build` with the log as JSON; `shell` and
 * `develop` first without what they are to start, and when all is built once more as they are. Other commands stay.
 * Throws UsageError for what nom itself does not know.
 */
export function underNom(command: readonly RemoteWord[]): Pick<Plan, "command" | "monitor" | "next"> {
  const [program, ...words] = command
  if (typeof program !== "string" || !isNom(program)) return { command, monitor: "none" }
  const log = ["-v", "--log-format", "internal-json"]
  if (program === "nom-build") return { command: ["nix-build", ...log, ...words], monitor: "nom" }
  if (program === "nom-shell") {
    const first = ["nix-shell", ...log, ...words, "--run", "exit"]
    return { command: first, monitor: "nom", next: ["nix-shell", ...words] }
  }
  const [action, ...rest] = words
  if (action === "build") return { command: ["nix", action, ...log, ...rest], monitor: "nom" }
  if (action !== "shell" && action !== "develop")
    throw new UsageError("nom shows only build, shell and develop", "edict HOST nom build .#x")
  const end = rest.findIndex((word) => word === "--command" || word === "-c")
  const first = ["nix", action, ...log, ...(end < 0 ? rest : rest.slice(0, end))]
  return {
    command: [...first, "--command", "sh", "-c", "exit"],
    monitor: "nom",
    next: ["nix", action, ...rest],
  }
}

/** The root of this machine's trees on a host: readable name, and a hash that tells machines and users apart. */
function clientRoot(where: { host: Host; slot: number; env: Env }): string {
  const identities = ["/etc/machine-id", "/var/lib/dbus/machine-id"].map((file) => readText(file))
  const machine = identities.find((identity) => identity) ?? os.hostname()
  const readable =
    os
      .hostname()
      .split(".")[0]!
      .replace(/[^A-Za-z0-9-]/g, "")
      .slice(0, 24) || "client"
  const client = hash(`${machine} ${process.getuid?.()} ${homeOf(where.env)}`).slice(0, 8)
  return `${where.host.directory}/${readable}-${client}${where.slot === 0 ? "" : `.${where.slot}`}`
}

/** The remote place of any local path: as it is inside a tree that travels, below the mirrored root elsewhere. */
function placeIn(trees: readonly Tree[], root: string, local: string): string {
  const tree = trees.findLast(
    ({ kind, local: outer }) => (kind === "git" || kind === "directory") && isWithin(local, outer),
  )
  return tree ? path.posix.join(tree.remote, path.relative(tree.local, local)) : remotePath(root, local)
}

/**
 * The place of a local path over there: only [A-Za-z0-9._/-]. Names with other characters become readable and
 * unique by a hash; all others stay, so that `../dep` still leads from one tree to the other.
 */
export function remotePath(root: string, local: string): string {
  const safe = (name: string) =>
    /^[A-Za-z0-9._-]+$/.test(name)
      ? name
      : `${name.replace(/[^A-Za-z0-9._-]/g, "_").slice(0, 100)}-${hash(name).slice(0, 10)}`
  return [
    `${root}/tree`,
    ...local
      .split("/")
      .filter((name) => name !== "")
      .map(safe),
  ].join("/")
}

const plainWord = (word: RemoteWord): string =>
  typeof word === "string"
    ? word
    : "update" in word
      ? word.update
      : `${word.prefix}${word.home.startsWith("/") ? "" : "$HOME/"}${word.home}${word.suffix}`

/** The plan as `--dry-run --json` prints it. */
export function planAsJson(plan: Plan): string {
  const { host, stateful, implicit, references, trees, cwd, command, monitor, next } = plan
  const nom = monitor === "nom" ? { monitor: NOM } : {}
  const listed = (words: readonly RemoteWord[]) => words.map((word) => withoutSecret(plainWord(word)))
  const second = next ? { next: listed(next) } : {}
  const settings = plan.settings.length > 0 ? { settings: plan.settings.map(settingName) } : {}
  const inputs = plan.inputs.length > 0 ? { inputs: plan.inputs.map((input) => input.path) } : {}
  return `${JSON.stringify({ host: host.name, stateful, implicit, references, trees: trees.map(({ local, remote, kind }) => ({ local, remote, kind })), ...inputs, cwd: cwd.remote, ...settings, command: listed(command), ...nom, ...second }, null, 2)}\n`
}

/** The plan as the shell lines that would run, stage after stage. */
export function describePlan(plan: Plan): string {
  const line = (argv: readonly string[]) => argv.map(shellQuote).join(" ")
  const ssh = ["ssh", ...plan.host.sshOptions, "--", plan.host.destination]
  const upload = plan.trees
    .filter((tree) => tree.kind !== "output")
    .map((tree) => [
      `# ${tree.kind} ${shown(tree.local)}: what changed since the last upload`,
      line(
        rsyncArguments(
          plan.host,
          ["ssh", ...plan.host.sshOptions],
          `${rootHere(tree)}/`,
          incomingOf(plan, tree),
        ),
      ),
    ])
  const quoted = (word: RemoteWord) =>
    typeof word === "string"
      ? shellQuote(withoutSecret(word))
      : "update" in word
        ? shellQuote(word.update)
        : `${shellQuote(word.prefix)}"${plainWord({ ...word, prefix: "", suffix: "" })}"${shellQuote(word.suffix)}`
  const secret = plan.settings.map((setting) => `${settingName(setting)} = …`).join("\n")
  const settings = secret === "" ? "" : `NIX_CONFIG=${shellQuote(secret)} `
  const runs = (command: readonly RemoteWord[]) =>
    line([...ssh, `cd ${shellQuote(plan.cwd.remote)} && ${settings}${command.map(quoted).join(" ")}`])
  const run =
    plan.monitor === "nom"
      ? `{ ${runs(plan.command)} 2>&1 >&3 | ${line(NOM)} >&2; } 3>&1`
      : runs(plan.command)
  const again = plan.next ? ["# and then, if that ended well", runs(plan.next)] : []
  const results = plan.options.action === "dry-run" ? describeResults(plan, line(ssh)) : []
  const home = plan.trees
    .filter((tree) => tree.comesHome !== "nothing")
    .map(
      (tree) =>
        `${line([...ssh, `tar -cf - -C ${tree.remote} CHANGED…`])} | tar -xf - -C STAGING   # then file by file into ${shown(tree.local)}${tree.comesHome === "all" ? "" : ": flake.lock only"}`,
    )
  const inputs = describeInputs(plan, line(ssh))
  return [...upload.flat(), ...inputs, "# run", run, ...again, ...results, ...home, ""].join("\n")
}

/** The lines for locked inputs that may have to go over. */
function describeInputs({ inputs, host }: Plan, ssh: string): string[] {
  if (inputs.length === 0) return []
  return [
    `# ${inputs.length} locked input${inputs.length === 1 ? "" : "s"}: what ${shown(host.name)} lacks of them, fetched here first if need be`,
    `tar -cf - -C /nix/store INPUTS… | ${ssh} 'tar -xf - && nix-store --add INPUT…'`,
  ]
}

/** The lines for what results there may be. */
function describeResults({ options, cwd }: Plan, ssh: string): string[] {
  if (options.materialize !== undefined)
    return [
      `# the files of what its result links lead to, as plain files`,
      `${ssh} 'tar -cf - -C /nix/store FILES…' | tar -xf - -C STAGING   # then into ${shown(path.resolve(cwd.local, options.materialize))}`,
    ]
  return [
    `# result links that it made, after their closures came home`,
    `${ssh} 'nix-store --export PATHS…' | nix-store --import`,
    "nix-store --realise PATH --indirect --add-root LINK",
  ]
}
// ── 8. Local state: what belongs to a tree, and the last state that both sides agreed on ────────────────
// A manifest per host and tree: path → type, mode, stat identity, content hash. What stat says is trusted
// where it is unchanged, everything else is hashed; so no edit is missed, however small or quick.

const MANIFEST_VERSION = 2

/** Changes within this time before the scan could still be followed by one with the same timestamp. */
const RACY_NANOSECONDS = 2_000_000_000n

/** Directory of edict's own state: manifests and locks. */
const stateDirectory = (env: Env): string =>
  path.join(env.XDG_STATE_HOME || path.join(homeOf(env), ".local/state"), "edict")

/** Directory of what can be made again: git copies, staging. */
const cacheDirectory = (env: Env): string =>
  path.join(env.XDG_CACHE_HOME || path.join(homeOf(env), ".cache"), "edict")

const manifestFile = (context: Context, tree: Tree, remote: string = tree.remote): string => {
  const { destination, sshOptions } = context.plan.host
  const host = hash(`${destination} ${sshOptions.join(" ")} ${remote}`).slice(0, 24)
  return path.join(stateDirectory(context.env), host, `${tree.id}.json`)
}

/** The manifest of the same tree in slot 0, which a new tree of another slot is copied from. */
function seedManifest(context: Context, tree: Tree): Manifest | undefined {
  const { root, seed } = context.plan
  return seed === "" ? undefined : readManifest(manifestFile(context, tree, tree.remote.replace(root, seed)))
}

/**
 * The manifest in `file`; undefined where there is none that can be read. Its second line, the entries, is read
 * when somebody asks for them: an unchanged tree is known by the fingerprint alone.
 */
function readManifest(file: string): Manifest | undefined {
  try {
    const content = fs.readFileSync(file, "utf8")
    const end = content.indexOf("\n")
    const { version, ...header } = JSON.parse(content.slice(0, end)) as Omit<Manifest, "entries"> & {
      version: number
    }
    if (version !== MANIFEST_VERSION) return undefined
    let read: Map<Name, Entry> | undefined
    return Object.defineProperty({ ...header } as Manifest, "entries", {
      enumerable: true,
      get: () => (read ??= parseEntries(content.slice(end + 1))),
    })
  } catch {
    return undefined
  }
}

function parseEntries(line: string): Map<Name, Entry> {
  const entries = JSON.parse(line) as [Name, Entry["type"], number, string, string][]
  return new Map(
    entries.map(([name, type, mode, identity, contents]) => [name, { type, mode, identity, hash: contents }]),
  )
}

/** Replaces a manifest as a whole: written beside, synced, renamed. */
function writeManifest(file: string, manifest: Manifest): void {
  const { entries, ...header } = manifest
  const rows = [...entries].map(([name, { type, mode, identity, hash: contents }]) => [
    name,
    type,
    mode,
    identity,
    contents,
  ])
  fs.mkdirSync(path.dirname(file), { recursive: true, mode: 0o700 })
  const temporary = `${file}.${process.pid}`
  const descriptor = fs.openSync(temporary, "w", 0o600)
  fs.writeSync(
    descriptor,
    `${JSON.stringify({ version: MANIFEST_VERSION, ...header })}\n${JSON.stringify(rows)}`,
  )
  fs.fsyncSync(descriptor)
  fs.closeSync(descriptor)
  fs.renameSync(temporary, file)
}

/** Where a path of a tree is read from: `inner` below `root`; .git comes from a copy elsewhere. */
type Place = Readonly<{ name: Name; root: string; inner: Name; stat: Stat }>

/** The state of every path, hashed where the manifest does not vouch for it. */
function sourcesOf(
  places: readonly Place[],
  known: ReadonlyMap<Name, Entry> | undefined,
  tick: () => void = () => undefined, // called for each file that is read
): Map<Name, Source> {
  const sources = new Map<Name, Source>()
  const now = nanoseconds()
  for (const place of places) {
    const { name, root, inner, stat } = place
    const type = typeOf(stat)
    if (type === "other") continue
    const before = known?.get(name)
    const seen = type === "directory" ? "" : identityOf(stat)
    const trusted = before !== undefined && seen !== "" && before.identity === seen && before.type === type
    const contents = trusted ? before.hash : contentHash(`${root}/${inner}`, type)
    if (!trusted) tick()
    sources.set(name, {
      name,
      root,
      inner,
      seen,
      entry: {
        type,
        mode: Number(stat.mode & 0o777n),
        identity: isSettled(stat, now) ? seen : "",
        hash: contents,
      },
    })
  }
  return sources
}

/** Nanoseconds since 1970, as stat has them. */
const nanoseconds = (): bigint => BigInt(Date.now()) * 1_000_000n

/** Whether the last change is so long ago that another one would show. */
function isSettled(stat: Stat, now: bigint): boolean {
  return now - stat.ctimeNs > RACY_NANOSECONDS && now - stat.mtimeNs > RACY_NANOSECONDS
}

/** A hash of all paths and of what stat says of them; undefined while one of them is not settled. */
function fingerprintOf(places: readonly Place[]): string | undefined {
  const now = nanoseconds()
  const rows: string[] = []
  for (const { name, stat } of places) {
    const isDirectory = stat.isDirectory()
    if (!isDirectory && !isSettled(stat, now)) return undefined
    rows.push(`${name}\0${stat.mode} ${isDirectory ? "" : identityOf(stat)}\n`)
  }
  return hash(rows.join(""))
}

async function listTree(tree: Tree, env: Env): Promise<Place[]> {
  const root = bytes(tree.local)
  switch (tree.kind) {
    case "git":
      return await listRepository(tree, root, "", env)
    case "directory":
      return listDirectory(root, "").map(({ inner, stat }) => ({ name: inner, root, inner, stat }))
    case "file": {
      const [directory, inner] = [bytes(path.dirname(tree.local)), bytes(path.basename(tree.local))]
      const stat = lstat(`${directory}/${inner}`)
      return stat ? [{ name: inner, root: directory, inner, stat }] : []
    }
    case "output":
      return []
  }
}

/**
 * Tracked and untracked, not ignored files of a repository, with those of submodules and nested repositories
 * by their own rules, and the slim copies of .git. `git ls-files` also names deleted files (skipped by lstat
 * later), unmerged paths three times, and directories for nested repositories (git 2.39).
 */
async function listRepository(tree: Tree, root: string, prefix: Name, env: Env): Promise<Place[]> {
  const directory = prefix === "" ? root : `${root}/${prefix.slice(0, -1)}`
  const copying = copyGit(text(directory), { history: tree.history, env })
  copying.catch(() => undefined)
  const list = (...which: string[]) => capture(git(text(directory), "ls-files", "-z", ...which))
  // It walks the directories, which takes as long as looking at the tracked files.
  const untracked = list("--others", "--exclude-standard")
  untracked.catch(() => undefined)
  const places: Place[] = []
  const nested: Name[] = []
  const add = (listed: string, kind: "tracked" | "untracked") => {
    const names = listed.split("\0").map((name) => (name.endsWith("/") ? name.slice(0, -1) : name))
    for (const inner of new Set(names)) {
      const stat = inner === "" || isOwn(inner) ? undefined : lstat(`${directory}/${inner}`)
      // Result links are this side's own; Nix does not see an untracked one.
      const isOut = kind === "untracked" && stat?.isSymbolicLink() && linksToStore(`${directory}/${inner}`)
      if (!stat || isOut) continue
      const name = prefix + inner
      if (stat.isDirectory() && lstat(`${directory}/${inner}/.git`)) nested.push(`${name}/`)
      else if (!stat.isDirectory() || kind === "tracked") places.push({ name, root, inner: name, stat }) // an empty submodule
    }
  }
  add(await list("--cached"), "tracked")
  add(await untracked, "untracked")
  for (const repository of nested) places.push(...(await listRepository(tree, root, repository, env)))
  const copy = bytes(await copying)
  return [
    ...places,
    ...listDirectory(copy, "").map((place) => ({
      ...place,
      name: `${prefix}.git/${place.inner}`,
      root: copy,
    })),
  ]
}

/** Every path below a directory, directories first; not edict's own conflicts. */
function listDirectory(root: string, prefix: Name): Pick<Place, "inner" | "stat">[] {
  const directory = buffer(prefix === "" ? root : `${root}/${prefix.slice(0, -1)}`)
  return fs.readdirSync(directory, { encoding: "buffer" }).flatMap((item) => {
    const inner = prefix + item.toString("latin1")
    const stat = isOwn(inner) ? undefined : lstat(`${root}/${inner}`)
    if (!stat) return []
    return stat.isDirectory() ? [{ inner, stat }, ...listDirectory(root, `${inner}/`)] : [{ inner, stat }]
  })
}

/** Paths that edict makes itself in a tree outside git. */
const isOwn = (name: Name): boolean =>
  name.includes(".edict-") && /(^|\/)\.edict-(conflicts|stage)(-[0-9a-f]+)?(\/|$)/.test(name)

/** What must go over, given the last agreed state and the tree as it is. */
export function compareTrees(before: ReadonlyMap<Name, Entry>, now: ReadonlyMap<Name, Source>): Delta {
  const send = [...now.values()].filter(({ name, entry }) => !isSame(before.get(name), entry))
  const gone = [...before].filter(([name, entry]) => now.get(name)?.entry.type !== entry.type)
  const files = gone.filter(([, entry]) => entry.type !== "directory").map(([name]) => name)
  const kept = new Set([...now.keys()].flatMap(parentsOf))
  const emptied = new Set([
    ...files.flatMap(parentsOf),
    ...gone.filter(([, entry]) => entry.type === "directory").map(([name]) => name),
  ])
  const directories = [...emptied].filter(
    (name) => !kept.has(name) && now.get(name)?.entry.type !== "directory",
  )
  return { send, remove: files, removeDirectories: directories.sort((a, b) => b.length - a.length) }
}

/** Every directory above a path, the nearest last. */
const parentsOf = (name: Name): Name[] =>
  name
    .split("/")
    .slice(0, -1)
    .map((_, at, parts) => parts.slice(0, at + 1).join("/"))

const isSame = (a: Entry | undefined, b: Entry): boolean =>
  a !== undefined && a.type === b.type && a.hash === b.hash && (a.type !== "file" || a.mode === b.mode)
// ── 9. Git copies: what of .git travels ─────────────────────────────────────────────────────────────────
// Nix derives rev, dirtyRev, revCount and lastModified from HEAD, the index, the trees and blobs of HEAD and all
// commit objects (some 250 bytes each). That much travels, as plain pack files, made anew only by what is new;
// never hooks, never the user's config. A worktree's or submodule's .git file becomes a directory of its own.

type GitState = Readonly<{
  directory: string // of this worktree: HEAD and index
  head: string // "" before the first commit
  branch: string // full name of the ref; "" on a detached HEAD
  refs: readonly string[] // "OBJECT NAME"
  shallow: string
  config: string
  filters: readonly string[] // names of the filter drivers configured here
  attributes: string // for info/attributes
  exclude: string // for info/exclude
}>

/** What the packs of a copy were made for: by it the next one is made of what is new alone. */
type Packed = Readonly<{ wanted: string; tips: readonly string[]; shallow: string; refs: readonly string[] }>

/** So many packs, then they become one again. */
const MOST_PACKS = 40

/** argv of git in `directory`: no locks taken, no hooks or monitors of the repository run. */
function git(directory: string, ...words: string[]): string[] {
  return [
    "git",
    "--no-optional-locks",
    "-c",
    "core.fsmonitor=false",
    "-c",
    "core.hooksPath=/dev/null",
    "-c",
    "safe.directory=*",
    "-C",
    directory,
    ...words,
  ]
}

/** Makes or renews the slim copy of a repository's .git; answers the directory that holds it. */
async function copyGit(repository: string, how: { history: Tree["history"]; env: Env }): Promise<string> {
  const copy = path.join(cacheDirectory(how.env), "git", hash(repository).slice(0, 24))
  const state = await readGitState(repository, how.env)
  fs.mkdirSync(path.join(copy, "objects/pack"), { recursive: true, mode: 0o700 })
  for (const directory of ["refs/heads", "info"])
    fs.mkdirSync(path.join(copy, directory), { recursive: true })
  await copyIndex(state, { repository, copy })
  const refs = await packObjects(repository, { state, copy, history: how.history })
  const filtered = await filteredFiles(state, { repository, copy })
  const filter = (name: string) => {
    const command = (verb: string) => `"sh \\"$(git rev-parse --absolute-git-dir)/filter\\" ${verb} %f"`
    return `[filter "${name}"]\n\tclean = ${command("clean")}\n\tsmudge = ${command("smudge")}\n`
  }
  const contents: Record<string, string> = {
    "packed-refs": refs.map((line) => `${line}\n`).join(""),
    HEAD: state.branch !== "" ? `ref: ${state.branch}\n` : `${state.head}\n`,
    // A repository that lacks objects on purpose cannot be repacked.
    config: `${state.config}[gc]\n\tauto = 0\n[maintenance]\n\tauto = false\n${filtered.drivers.map(filter).join("")}`,
    shallow: state.shallow,
    "info/attributes": state.attributes,
    "info/exclude": state.exclude,
    filter: filtered.drivers.length > 0 ? FILTER_SCRIPT : "",
    filtered: filtered.files,
  }
  for (const [name, content] of Object.entries(contents))
    if (content === "" && name !== "packed-refs") fs.rmSync(path.join(copy, name), { force: true })
    else replaceFile(copy, name, content)
  return copy
}

/** What the copy is made from. */
async function readGitState(repository: string, env: Env): Promise<GitState> {
  const ask = async (...words: string[]) =>
    (await capture(git(repository, ...words), "may-fail")).replace(/\n$/, "")
  const [directory, common, head, branch, refs, settings] = await Promise.all([
    capture(git(repository, "rev-parse", "--absolute-git-dir")),
    capture(git(repository, "rev-parse", "--path-format=absolute", "--git-common-dir")),
    ask("rev-parse", "--verify", "--quiet", "HEAD"),
    ask("symbolic-ref", "--quiet", "HEAD"),
    ask("for-each-ref", "--format=%(objectname) %(refname)"),
    ask(
      "config",
      "--null",
      "--get-regexp",
      "^(user\\.(name|email)|core\\.(filemode|symlinks|ignorecase|autocrlf|eol|precomposeunicode|attributesfile|excludesfile)|extensions\\.objectformat|submodule\\..*\\.active|submodule\\..*\\.url|filter\\..*\\.(clean|smudge|process))$",
    ),
  ])
  const pairs = settings.split("\0")
  const [filters, others] = partition(pairs, (pair) => pair.startsWith("filter."))
  const [files, config] = partition(others, (pair) => /^core\.(attributes|excludes)file\n/.test(pair))
  const commonDirectory = text(common.replace(/\n$/, ""))
  return {
    directory: text(directory.replace(/\n$/, "")),
    head,
    branch,
    refs: lines(refs),
    shallow: readText(path.join(commonDirectory, "shallow")) ?? "",
    config: minimalConfig(config.join("\0")),
    filters: [...new Set(filters.map((pair) => /^filter\.(.*)\.[a-z]+\n/s.exec(pair)?.[1] ?? ""))],
    ...patternsOf(commonDirectory, files, env),
  }
}

/** The config of the copy: identity and how files are read; never urls with tokens, filters, hooks or includes. */
export function minimalConfig(settings: string): string {
  const pairs = settings
    .split("\0")
    .filter((pair) => pair !== "")
    .map((pair): [string, string] => {
      const [, key = pair, value = "true"] = /^([^\n]*)\n(.*)$/s.exec(pair) ?? [] // without "=" it means true
      return [key, value]
    })
  const quoted = (value: string) =>
    `"${value.replace(/[\\"]/g, "\\$&").replace(/\n/g, "\\n").replace(/\t/g, "\\t")}"`
  const format = pairs.find(([key]) => key === "extensions.objectformat")
  const lines = [
    ["core.repositoryformatversion", format ? "1" : "0"],
    ["core.bare", "false"],
    ...new Map(pairs),
  ]
    .filter(([key]) => !key!.endsWith(".url"))
    .map(([key, value]) => {
      const parts = /^([^.]+)\.(?:(.*)\.)?([^.]+)$/s.exec(key!)!
      return `[${parts[1]}${parts[2] === undefined ? "" : ` ${quoted(parts[2])}`}]\n\t${parts[3]} = ${quoted(value!)}\n`
    })
  const active = pairs
    .filter(([key]) => key.endsWith(".url"))
    .map(
      ([key]) => `[submodule ${quoted(key.slice("submodule.".length, -".url".length))}]\n\tactive = "true"\n`,
    )
  return [...lines, ...active].join("")
}

/** The index as one file: Nix since 2.20 refuses a split index. Written only when its bytes changed. */
async function copyIndex(state: GitState, to: { repository: string; copy: string }): Promise<void> {
  const { repository, copy } = to
  const index = path.join(state.directory, "index")
  if (!fs.existsSync(index)) return fs.rmSync(path.join(copy, "index"), { force: true })
  const split = fs.readdirSync(state.directory).some((name) => name.startsWith("sharedindex."))
  if (!split) return replaceFile(copy, "index", fs.readFileSync(index))
  const temporary = `${copy}.${randomName()}`
  try {
    fs.copyFileSync(index, temporary)
    await capture([
      "env",
      `GIT_INDEX_FILE=${temporary}`,
      ...git(repository, "update-index", "--no-split-index"),
    ])
    replaceFile(copy, "index", fs.readFileSync(temporary))
  } finally {
    fs.rmSync(temporary, { force: true })
  }
}

/**
 * Adds a pack with what the copy lacks: all commits of HEAD, trees and blobs of HEAD and its parent, what is
 * staged, and tags on the way; for a full history every object of every ref. Answers the refs of the copy.
 */
async function packObjects(
  repository: string,
  work: { state: GitState; copy: string; history: Tree["history"] },
): Promise<readonly string[]> {
  const { state, copy, history } = work
  const { head, branch, shallow } = state
  const index = fs.existsSync(path.join(copy, "index")) ? hash(fs.readFileSync(path.join(copy, "index"))) : ""
  const wanted = hash([head, branch, index, shallow, ...state.refs].join("\n"))
  const before = readPacked(`${copy}.packed.${history}`)
  if (before?.wanted === wanted) return before.refs
  const packs = path.join(copy, "objects/pack")
  const one = fs.readdirSync(packs).length > 2 * MOST_PACKS || (before && before.shallow !== shallow)
  if (one) {
    for (const name of [`${copy}.packed.head`, `${copy}.packed.full`]) fs.rmSync(name, { force: true })
    for (const name of fs.readdirSync(packs)) fs.rmSync(path.join(packs, name))
  }
  const merged =
    head === "" || history === "full"
      ? []
      : lines(
          await capture(
            git(
              repository,
              "for-each-ref",
              "--merged=HEAD",
              "--format=%(objectname) %(refname)",
              "refs/tags",
            ),
          ),
        )
  const own = head !== "" && branch !== "" ? [`${head} ${branch}`] : []
  const others = (history === "full" ? state.refs : merged).filter((line) => refName(line) !== branch)
  const refs = [...others.filter((line) => !/ refs\/(edict\/|stash$)/.test(line)), ...own].sort((a, b) =>
    refName(a) < refName(b) ? -1 : 1,
  )
  const tips = [...new Set([...(head === "" ? [] : [head]), ...refs.map((line) => line.split(" ")[0]!)])]
  const listing = await listObjects(repository, {
    history,
    head,
    tags: merged,
    tips: one ? [] : (before?.tips ?? []),
  })
  await packMissing(repository, { copy, listing })
  replaceFile(
    path.dirname(copy),
    `${path.basename(copy)}.packed.${history}`,
    JSON.stringify({ wanted, tips, shallow, refs }),
  )
  return refs
}

const refName = (line: string): string => line.slice(line.indexOf(" ") + 1)

function readPacked(file: string): Packed | undefined {
  try {
    return JSON.parse(fs.readFileSync(file, "latin1")) as Packed
  } catch {
    return undefined
  }
}

/** Shell lines that print the objects a copy needs, but for most of those that came with the commits `tips`. */
async function listObjects(
  repository: string,
  wanted: { history: Tree["history"]; head: string; tags: readonly string[]; tips: readonly string[] },
): Promise<string[]> {
  const { history, head, tags, tips } = wanted
  const g = git(repository).map(shellQuote).join(" ")
  const objects = `${g} rev-list --objects --no-object-names --ignore-missing`
  const unmerged = `${g} ls-files --unmerged | awk '{ print $2 }'`
  const staged = `${g} diff-index --cached HEAD | awk '$4 !~ /^0+$/ && $2 != "160000" { print $4 }'; ${unmerged}`
  if (head === "" && history === "head") return [`${g} ls-files --stage | awk '$1 != "160000" { print $2 }'`]
  if (history === "full")
    return [
      `${objects} --all --reflog ${head === "" ? "" : "HEAD"} --not ${tips.join(" ")}`,
      head === "" ? `${g} ls-files --stage | awk '$1 != "160000" { print $2 }'` : staged,
    ]
  const [last] = tips
  const known = last !== undefined && (await succeeds(git(repository, "cat-file", "-e", `${last}^{commit}`)))
  const not = (what: string) => (known ? ` --not ${last}${what}` : "")
  return [
    `${g} rev-list HEAD${not("")}`,
    `${objects} 'HEAD^{tree}'${not("^{tree}")}`,
    `if ${g} rev-parse -q --verify 'HEAD~1^{tree}' >/dev/null; then ${objects} 'HEAD~1^{tree}'${not("^{tree}")}; fi`,
    ...(tags.length > 0 ? [`printf '%s\\n' ${tags.map((line) => line.split(" ")[0]!).join(" ")}`] : []),
    staged,
  ]
}

/** Packs the listed objects that the copy does not have; a pack comes to lie there as a whole. */
async function packMissing(
  repository: string,
  to: { copy: string; listing: readonly string[] },
): Promise<void> {
  const packs = path.join(to.copy, "objects/pack")
  const temporary = `${to.copy}.${randomName()}`
  const g = git(repository).map(shellQuote).join(" ")
  const have = fs
    .readdirSync(packs)
    .filter((name) => name.endsWith(".idx"))
    .map((name) => `${g} show-index <${shellQuote(path.join(packs, name))} | awk '{ print $2 }'`)
  const [wanted, there] = ["wanted", "there"].map((name) => shellQuote(path.join(temporary, name)))
  // Git first writes a pack among the objects, then renames it: never in the repository, nor across file systems.
  const objects = await capture(
    git(repository, "rev-parse", "--path-format=absolute", "--git-path", "objects"),
  )
  const listed = text(objects.replace(/\n$/, "").replace(/[\\"]/g, "\\$&").replaceAll("\n", "\\n"))
  const variables = `GIT_OBJECT_DIRECTORY=${shellQuote(temporary)} GIT_ALTERNATE_OBJECT_DIRECTORIES=${shellQuote(`"${listed}"`)}`
  const script = `set -e -o pipefail; export LC_ALL=C
    { ${to.listing.join("; ")}; } | sort -u >${wanted}
    { :; ${have.map((line) => `${line}; `).join("")}} | sort -u >${there}
    comm -23 ${wanted} ${there} | ${variables} ${g} pack-objects -q --non-empty ${shellQuote(path.join(temporary, "pack"))}`
  fs.mkdirSync(temporary, { mode: 0o700 })
  try {
    await capture(["bash", "-c", script])
    const made = fs
      .readdirSync(temporary)
      .filter((name) => name.startsWith("pack-"))
      .sort((a, b) => Number(a.endsWith(".idx")) - Number(b.endsWith(".idx")))
    for (const name of made) fs.renameSync(path.join(temporary, name), path.join(packs, name))
  } finally {
    fs.rmSync(temporary, { recursive: true, force: true })
  }
}

/** The repository's own attributes and ignore rules, after those of the user: they decide what is clean, and ignored. */
function patternsOf(
  common: string,
  settings: readonly string[],
  env: Env,
): { attributes: string; exclude: string } {
  const users = (option: string, name: string) => {
    const value = settings.findLast((pair) => pair.startsWith(`${option}\n`))?.slice(option.length + 1)
    if (value !== undefined) return text(value.replace(/^~(?=\/)/, bytes(homeOf(env))))
    return path.join(env.XDG_CONFIG_HOME || path.join(homeOf(env), ".config"), "git", name)
  }
  const read = (file: string) => {
    const content = fs.existsSync(file) && fs.statSync(file).isFile() ? fs.readFileSync(file, "latin1") : ""
    return content === "" || content.endsWith("\n") ? content : `${content}\n`
  }
  const info = (name: string) => read(path.join(common, "info", name))
  return {
    attributes: read(users("core.attributesfile", "attributes")) + info("attributes"),
    exclude: read(users("core.excludesfile", "ignore")) + info("exclude"),
  }
}

/**
 * What the filters of this side (git-lfs and the like) make of the files that are as committed: "CONTENT CLEAN"
 * for each, names of blobs. By it git takes them for unchanged over there, without the filters.
 */
async function filteredFiles(
  state: GitState,
  at: { repository: string; copy: string },
): Promise<{ drivers: string[]; files: string }> {
  const drivers = state.filters.filter((name) => /^[\w.-]+$/.test(name))
  const none = { drivers: [], files: "" }
  if (drivers.length === 0) return none
  const filtered = ["--", ...drivers.map((name) => `:(attr:filter=${name})`)]
  const staged = await capture(git(at.repository, "ls-files", "-z", "--stage", ...filtered))
  if (staged === "") return none
  const changed = await capture(git(at.repository, "diff", "--no-ext-diff", "--name-only", "-z", ...filtered))
  const edited = new Set(changed.split("\0"))
  const clean = staged.split("\0").flatMap((line) => {
    const [, object, name] = /^100\d+ ([0-9a-f]+) 0\t(.*)$/s.exec(line) ?? []
    const stat = name === undefined ? undefined : lstat(`${bytes(at.repository)}/${name}`)
    if (!stat?.isFile() || edited.has(name!) || name!.includes("\n")) return []
    return [{ object: object!, name: name!, identity: identityOf(stat) }]
  })
  const cache = `${at.copy}.filtered`
  const known = new Map(lines(readText(cache) ?? "").map((line) => line.split("\t") as [string, string]))
  const unknown = clean.filter(({ identity }) => !known.has(identity))
  const hashed = lines(
    await capture(
      git(at.repository, "hash-object", "--no-filters", "--stdin-paths"),
      "throws",
      Buffer.from(unknown.map(({ name }) => `./${name}\n`).join(""), "latin1"),
    ),
  )
  for (const [index, { identity }] of unknown.entries()) known.set(identity, hashed[index]!)
  const pairs = clean.map(({ identity, object }) => ({ identity, object, content: known.get(identity)! }))
  replaceFile(
    path.dirname(at.copy),
    path.basename(cache),
    pairs.map(({ identity, content }) => `${identity}\t${content}\n`).join(""),
  )
  const files = [...new Set(pairs.map(({ content, object }) => `${content} ${object}\n`))].sort().join("")
  return { drivers, files }
}

/** The filter of the copy: knows the files that were uploaded, and leaves all else as it is. */
const FILTER_SCRIPT = `# usage: filter clean|smudge FILE <CONTENT
list=$(git rev-parse --absolute-git-dir)/filtered
content=$(mktemp) || exit 1
trap 'rm -f "$content"' EXIT
cat >"$content" || exit 1
have=$(git hash-object --no-filters "$content") || exit 1
if [ "$1" = clean ]; then
  clean=$(awk -v have="$have" '$1 == have { print $2; exit }' "$list")
  if [ -n "$clean" ]; then git cat-file blob "$clean"; else cat "$content"; fi
elif [ -f "$2" ] && grep -qxF "$(git hash-object --no-filters -- "$2") $have" "$list"; then
  cat -- "$2"
else
  cat "$content"
fi
`

/** Writes a file of the copy whole, and only if its content differs: an unchanged file keeps its stat identity. */
function replaceFile(directory: string, name: string, content: string | Buffer): void {
  const wanted = typeof content === "string" ? buffer(content) : content
  try {
    if (fs.readFileSync(path.join(directory, name)).equals(wanted)) return
  } catch {
    // it is not there yet
  }
  const temporary = path.join(directory, "..", `.${randomName()}`)
  fs.writeFileSync(temporary, wanted)
  fs.renameSync(temporary, path.join(directory, name))
}
// ── 10. Upload: the remote trees become what the local ones are ─────────────────────────────────────────
// The agent says whether a tree is what the manifest takes it for. What differs goes by rsync, or by tar where one
// side has no rsync that is fit, from explicit lists, into an empty directory beside the tree, and is put in its place
// when all of it is there.

/** What every tree is here now, beside what it was when both sides agreed. */
async function scanTrees(context: Context): Promise<Scanned[]> {
  return await Promise.all(context.plan.trees.map((tree) => scanAgainst(context, tree)))
}

/** What both ways of running answer. */
type Ran = Readonly<{ states: readonly TreeState[]; outcome: Outcome }>

/** Most bytes and files of an upload that rides on the agent's channel instead of an rsync of its own. */
const INLINE_BYTES = 48 * 1024
const INLINE_FILES = 24

/**
 * The quick way, one round trip: where little or nothing changed, checks, small files and the command all go out
 * together, and the agent stops at the first tree that is not as expected. Then, or where more changed, the answer is
 * undefined, and nothing has happened.
 */
async function runAtOnce(context: Context, scans: readonly Scanned[]): Promise<Ran | undefined> {
  const { plan } = context
  const session = context.session!
  const updates = scans.map((scanned, at) => {
    const { manifest, unsettled, places, fingerprint, isSame } = scanned
    const now = manifest && {
      manifest,
      places,
      fingerprint,
      isSame,
      get sources() {
        return scanned.sources
      },
    }
    return now && !unsettled ? updateOf(plan.trees[at]!, now) : undefined
  })
  if (plan.storePaths.length > 0 || !updates.every((update) => update !== undefined && isSmall(update.delta)))
    return undefined
  // First of all: what comes after a request that fails does not happen.
  const asked = plan.inputs.length > 0 ? [session.ask("valid", ...plan.inputs.map(({ path }) => path))] : []
  const requests = updates.flatMap((update) => {
    const opening = openTree(context, update!.tree, {
      manifests: [update!.agreed],
      places: update!.places,
      state: "same",
    })
    return [
      opening,
      ...(isEmpty(update!.delta)
        ? []
        : [
            ...update!.delta.send.map((source) => sendInline(context, update!.tree, source)),
            ...commitTree(context, update!),
          ]),
    ]
  })
  const running = runCommand(context, plan.trees)
  const failed = (await Promise.allSettled([session.greeting, ...asked, ...requests])).find(
    (result) => result.status === "rejected",
  )
  if (!failed) {
    const states = updates.map((update) => settle(context, update!))
    return { states, outcome: await stage(context, "run", () => running) }
  }
  await running.catch(() => undefined)
  if (!(failed.reason instanceof Unexpected)) throw failed.reason
  await session.ask("again")
  return undefined
}

/** The usual way: every tree is brought up to date, then the command runs. */
async function runAfterUpload(context: Context, scans: readonly Scanned[]): Promise<Ran> {
  // It came while runAtOnce tried.
  if (context.signal)
    throw new EdictError("interrupted before the command began", "", signalCode(context.signal))
  const states = await stage(context, "upload", () => upload(context, scans))
  return { states, outcome: await stage(context, "run", () => runCommand(context, context.plan.trees)) }
}

/** Brings every tree up to date; answers their agreed states. Nothing of a failed upload is put in place. */
async function upload(context: Context, scans: readonly Scanned[]): Promise<TreeState[]> {
  const states: TreeState[] = []
  context.rsync = askRsync(context.env) // beside the first request
  context.rsync.catch(() => undefined)
  const { inputs } = context.plan
  const lacking = inputs.length > 0 ? context.session!.ask("missing", ...inputs.map(({ path }) => path)) : []
  for (const [at, tree] of context.plan.trees.entries())
    states.push(await uploadTree(context, tree, scans[at]!))
  for (const { tree } of states) if (tree.input) await context.session!.ask("input", tree.id, tree.input)
  await uploadStorePaths(context)
  const paths = new Set((await lacking).map((line) => line.slice(2)))
  await uploadInputs(
    context,
    inputs.filter(({ path }) => paths.has(path)),
  )
  return states
}

/**
 * `unsettled`: an upload was cut off, and only the other side knows how far it came. `isSame`: nothing changed here
 * since the agreed state; then nobody needs the sources.
 */
type Scanned = Readonly<{
  manifest: Manifest | undefined
  unsettled: Manifest | undefined
  places: readonly Place[]
  fingerprint?: string
  isSame: boolean
  sources: ReadonlyMap<Name, Source>
}>

async function scanAgainst(context: Context, tree: Tree): Promise<Scanned> {
  const file = manifestFile(context, tree)
  const places = await listTree(tree, context.env)
  const fingerprint = fingerprintOf(places)
  const saved = readManifest(file)
  const unsettled = readManifest(`${file}.next`)
  const isDated = tree.kind !== "directory" || saved?.newest === newestOf(tree, places)
  if (saved && isDated && fingerprint !== undefined && saved.fingerprint === fingerprint)
    return {
      manifest: saved,
      unsettled,
      places,
      fingerprint,
      isSame: true,
      get sources() {
        return sourcesOf(places, saved.entries)
      },
    }
  const sources = sourcesOf(places, saved?.entries, context.steps.tick)
  const manifest = saved && { ...saved, pruned: await stillIgnored({ tree, manifest: saved }, sources) }
  return { manifest, unsettled, places, fingerprint, isSame: false, sources }
}

/** The directories that were ignored when the manifest was made, and still are, and hold nothing that travels. */
async function stillIgnored(state: TreeState, sources: ReadonlyMap<Name, Source>): Promise<readonly Name[]> {
  const { pruned } = state.manifest
  if (pruned.length === 0) return []
  const directories = pruned.map((name) => ({ name, type: "directory" as const }))
  const { names } = await ignoredNames(state, directories)
  const holding = new Set([...sources.keys()].flatMap((name) => [name, ...parentsOf(name)]))
  return pruned.filter((name) => names.has(name) && !holding.has(name))
}

/** What brings a tree from the agreed state to what it is here now, and the manifest of the state after it. */
type Update = Readonly<{
  tree: Tree
  agreed: Manifest
  places: readonly Place[]
  delta: Delta
  manifest: Manifest
}>

type Now = Readonly<{
  manifest: Manifest
  places: readonly Place[]
  fingerprint?: string
  isSame: boolean
  sources: ReadonlyMap<Name, Source>
}>

function updateOf(tree: Tree, now: Now): Update {
  const { manifest: agreed, places, fingerprint } = now
  if (now.isSame)
    return { tree, agreed, places, manifest: agreed, delta: { send: [], remove: [], removeDirectories: [] } }
  // Nix takes the newest mtime of a `path:` flake, directories included, for lastModified.
  const newest = tree.kind === "directory" ? newestOf(tree, places) : undefined
  const changed = newest !== agreed.newest ? newest : undefined
  const delta = { ...compareTrees(agreed.entries, now.sources), newest: changed }
  const entries = new Map([...now.sources].map(([name, { entry }]) => [name, entry]))
  const manifest = isEmpty(delta)
    ? { ...agreed, entries, fingerprint }
    : { token: randomName(), entries, pruned: agreed.pruned, newest, fingerprint }
  return { tree, agreed, places, delta, manifest }
}

const isEmpty = (delta: Delta): boolean =>
  delta.send.length + delta.remove.length + delta.removeDirectories.length === 0 && delta.newest === undefined

/** Whether a delta may ride on the agent's channel. */
function isSmall({ send, remove }: Delta): boolean {
  const size = ({ root, inner }: Source) => Number(lstat(`${root}/${inner}`)?.size ?? 0n)
  return (
    send.length <= INLINE_FILES &&
    remove.length <= 1000 &&
    send.reduce((total, source) => total + size(source), 0) <= INLINE_BYTES
  )
}

async function uploadTree(context: Context, tree: Tree, scanned: Scanned): Promise<TreeState> {
  const manifests = [scanned.manifest, scanned.unsettled, seedManifest(context, tree)].filter(
    (manifest) => manifest !== undefined,
  )
  const opened = await openTree(context, tree, { manifests, places: scanned.places, state: "any" })
  const agreed = manifests.find(({ token, previous }) => opened.token === token || opened.token === previous)
  let now: Now = {
    ...scanned,
    manifest: { token: "", entries: new Map(), pruned: [], ...agreed },
    isSame: scanned.isSame && agreed === scanned.manifest,
  }
  if (agreed && opened.changes.length > 0) {
    const manifest = { ...now.manifest, ...(await recover(context, { tree, manifest: agreed }, opened)) }
    const places = await listTree(tree, context.env)
    now = {
      manifest,
      places,
      fingerprint: fingerprintOf(places),
      isSame: false,
      sources: sourcesOf(places, manifest.entries),
    }
  }
  const update = updateOf(tree, now)
  if (isEmpty(update.delta) && opened.state === "same") return settle(context, update)
  const whole = { ...update, manifest: { ...update.manifest, token: randomName(), previous: undefined } }
  if (whole.delta.send.length > 0)
    await sendFiles(context, tree, { delta: whole.delta, rsyncThere: opened.rsync })
  await Promise.all(commitTree(context, whole))
  return settle(context, whole)
}

/** An update that the other side has confirmed becomes the agreed state. */
function settle(context: Context, update: Update): TreeState {
  const { tree, agreed, manifest, places } = update
  const file = manifestFile(context, tree)
  if (manifest === agreed) return { tree, manifest, places }
  if (manifest.token !== agreed.token) fs.renameSync(`${file}.next`, file)
  else if (
    manifest.fingerprint !== agreed.fingerprint ||
    [...manifest.entries].some(([name, { identity }]) => agreed.entries.get(name)?.identity !== identity)
  )
    writeManifest(file, manifest)
  return { tree, manifest: readManifest(file) ?? manifest, places }
}

/**
 * What the agent says of a tree: `same` as agreed, `drifted` (changed by somebody else), `interrupted` (a run whose
 * changes never came home), `discarded` (the same, of a run whose changes were not to come home), `fresh`.
 */
type Opened = Readonly<{
  state: "same" | "drifted" | "interrupted" | "discarded" | "fresh"
  token: string
  git: GitChanges
  changes: readonly Change[]
  rsync: string // first line of what rsync over there says of itself; "" without one
}>

async function openTree(
  context: Context,
  tree: Tree,
  known: { manifests: readonly Manifest[]; places: readonly Place[]; state: "same" | "any" },
): Promise<Opened> {
  const [root, only] = remoteRootOf(tree)
  const nested = context.plan.trees.filter(
    (other) => other !== tree && other.kind === "directory" && isWithin(other.local, tree.local),
  )
  const pruned = [
    ...(known.manifests[0]?.pruned ?? []),
    ...nested.map((other) => bytes(path.relative(tree.local, other.local))),
  ]
  const patterns = pruned
    .filter((name) => !name.includes("\n"))
    .map((name) => `./${name.replace(/[*?[\\]/g, "\\$&")}\n`)
  const tokens = known.manifests.flatMap(({ token, previous }) => (previous ? [token, previous] : [token]))
  const prefixes = [...new Set(known.places.map(prefixOf))]
  const words = [
    tree.id,
    root,
    bytes(only),
    patterns.join(""),
    tokens.join(" "),
    prefixes.join("\n"),
    context.plan.seed,
    known.state,
  ]
  const answer = await context.session!.askBytes("tree", ...words)
  const state = answer.find((line) => /^s (same|drifted|interrupted|discarded|fresh) /.test(line))?.split(" ")
  if (!state)
    throw new EdictError(`${context.plan.host.name} gave an answer that is none, on ${shown(tree.local)}`)
  return {
    state: state[1] as Opened["state"],
    token: state[2]!,
    // What is passed over since then only seems to be gone.
    changes: parseChanges(answer.filter((line) => !line.startsWith("s "))).filter(
      ({ name, what }) => what !== "deleted" || !pruned.some((directory) => isWithin(name, directory)),
    ),
    git: parseGitChanges(answer),
    rsync: answer.find((line) => line.startsWith("r "))?.slice(2) ?? "",
  }
}

/** Remote directory of a tree, and the one name in it for a tree that is a single path. */
function remoteRootOf(tree: Tree): [string, string] {
  return tree.kind === "file" || tree.kind === "output"
    ? [path.posix.dirname(tree.remote), path.basename(tree.local)]
    : [tree.remote, ""]
}

/** Where an upload waits until it is whole. */
const incomingOf = (plan: Plan, tree: Tree): string => `${plan.root}/meta/${tree.id}/in/`

/**
 * argv of the rsync that carries listed files up; the list comes on standard input, NUL-separated. -I: no quick
 * check (it compares whole seconds), the manifest has decided. No -o -g: a tree owned by another uid is refused
 * by git and Nix.
 */
export function rsyncArguments(host: Host, ssh: readonly string[], from: string, to: string): string[] {
  const quoted = ssh
    .map((word) => (/^[A-Za-z0-9_./=:@%+,-]+$/.test(word) ? word : `'${word.replaceAll("'", "''")}'`))
    .join(" ")
  const [user, name] = /^(?:(.*)@)?(.*)$/s.exec(host.destination)!.slice(1)
  const destination = `${user === undefined ? "" : `${user}@`}${name!.includes(":") ? `[${name}]` : name}`
  return [
    "rsync",
    "-lptI",
    "--chmod=Du+rwx",
    "--whole-file",
    "--from0",
    "--files-from=-",
    "-e",
    quoted,
    "--",
    from,
    `${destination}:${to}`,
  ]
}

/**
 * What is wrong with an rsync, by the first line of what `rsync --version` says ("" where there is none); undefined if
 * it is fit. openrsync (of macOS since 15.4, and of OpenBSD) stops at a dangling symbolic link in --files-from, or
 * does not know the option.
 */
export function unfitRsync(version: string): string | undefined {
  if (version === "") return "no rsync"
  return /^rsync +version /.test(version) ? undefined : version.split(":")[0]!
}

/** First line of what rsync here says of itself; "" without one. */
async function askRsync(env: Env): Promise<string> {
  if (!hasProgram("rsync", env)) return ""
  return firstLine(await capture(["bash", "-c", "rsync --version 2>&1"], "may-fail"))
}

/** Files that are read from one directory, and the directory there that takes them. */
type Cargo = Readonly<{ tree: Tree; root: string; to: Name; sources: readonly Source[]; progress: Progress }>

/** Carries files into the empty directory beside the tree: one rsync, or tar, for each directory they are read from. */
async function sendFiles(
  context: Context,
  tree: Tree,
  upload: { delta: Delta; rsyncThere: string },
): Promise<void> {
  const { send } = upload.delta
  const rsyncHere = await (context.rsync ??= askRsync(context.env))
  const [here, there] = [unfitRsync(rsyncHere), unfitRsync(upload.rsyncThere)]
  const why = here ? `${here} here` : there ? `${there} on ${context.plan.host.name}` : undefined
  if (why !== undefined) tellOfTar(context, why)
  const groups = Map.groupBy(send, (source) => JSON.stringify([source.root, prefixOf(source)]))
  const sending = [...groups].map(async ([key, sources]) => {
    const [root, prefix] = JSON.parse(key) as [string, string]
    const sizes = sources.map((source) => Number(lstat(`${source.root}/${source.inner}`)?.size ?? 0n))
    const progress = await startProgress(context, "files", sizes)
    const cargo = { tree, root, to: bytes(incomingOf(context.plan, tree)) + prefix, sources, progress }
    const sent = why === undefined ? sendByRsync(context, cargo, rsyncHere) : sendByTar(context, cargo)
    await sent.finally(progress.end)
    context.report.bytesUp += sum(sizes)
  })
  const making = why === undefined ? [] : [makeDirectories(context.session!, tree, send)]
  await Promise.all([...sending, ...making])
}

/** `-v`, once a run: why rsync does not do it. */
function tellOfTar(context: Context, why: string): void {
  const message = `files go up by tar: ${shown(why)}`
  if (context.report.notes.includes(message)) return
  context.report.notes.push(message)
  if (context.plan.options.verbosity > 0) say(message)
}

async function sendByRsync(context: Context, cargo: Cargo, version: string): Promise<void> {
  const { tree, root, to, sources, progress } = cargo
  // A name with # or ; in front would be a comment.
  const names = sources.map(({ inner }) => `${inner.replace(/^(?=[#;])/, "./")}\0`).join("")
  const [command, ...options] = rsyncArguments(
    context.plan.host,
    context.noisy ? pastNoise(sshProgram(context)) : sshProgram(context),
    `${text(root)}/`,
    text(to),
  )
  if (context.noisy) options.unshift(`--rsync-path=${BEGIN}; rsync`)
  const counting = progress.counter && version.includes("version 3.") ? ["--info=progress2"] : []
  await execute(context, [command!, ...counting, ...options], {
    input: Buffer.from(names, "latin1"),
    what: `upload of ${shown(tree.local)}`,
    onOutput: progress.read,
  })
}

/** The same by tar through ssh. Directories are made when the upload is put in its place, whatever their modes here. */
async function sendByTar(context: Context, { tree, root, to, sources, progress }: Cargo): Promise<void> {
  const { host } = context.plan
  const files = sources.filter(({ entry }) => entry.type !== "directory")
  if (files.length === 0) return
  const stages = [
    ["bash", "-c", SEND_SCRIPT, "bash", text(root)],
    ...(progress.counter ? [progress.counter] : []),
    withScript(sshArguments(context), UNPACK_SCRIPT, encodeWord(to, "latin1")),
  ]
  await execute(context, pipeline(...stages), {
    input: Buffer.from(files.map(({ inner }) => `./${inner}\0`).join(""), "latin1"),
    what: `upload of ${shown(tree.local)}`,
    onErrors: progress.read,
    failure: (code, errors) =>
      code === 255 && !/No space left|Disk quota|^ssh: /m.test(errors)
        ? new EdictError(
            `the connection to ${host.name} was lost during the upload of ${shown(tree.local)}`,
            "run it again",
            SSH_FAILED,
          )
        : undefined,
  })
}

/** Names the directories that no file brings along to the agent. */
async function makeDirectories(session: Session, tree: Tree, send: readonly Source[]): Promise<void> {
  const [directories, files] = partition(send, ({ entry }) => entry.type === "directory")
  const made = new Set(files.flatMap(({ name }) => parentsOf(name)))
  const names = directories.filter(({ name }) => !made.has(name)).map(({ name }) => `./${name}\0`)
  if (names.length > 0) await session.askBytes("list", tree.id, "mkdir", names.join(""))
}

/** What a path's name in the tree has before its name in the directory it is read from: "", or ".git/". */
const prefixOf = ({ name, inner }: Pick<Place, "name" | "inner">): Name =>
  name.slice(0, name.length - inner.length)

/** Files that changed while they travelled are sent again next time: what is there is not known. */
function distrustMoved(entries: ReadonlyMap<Name, Entry>, sent: readonly Source[]): Map<Name, Entry> {
  const result = new Map(entries)
  for (const { root, inner, name, seen, entry } of sent) {
    const stat = lstat(`${root}/${inner}`)
    if (entry.type !== "directory" && (!stat || identityOf(stat) !== seen))
      result.set(name, { ...entry, identity: "", hash: UNKNOWN })
  }
  return result
}

/** Sends one small file, link or directory in a request. */
async function sendInline(context: Context, tree: Tree, { root, inner, name, entry }: Source): Promise<void> {
  const file = `${root}/${inner}`
  const content =
    entry.type === "directory"
      ? ""
      : entry.type === "link"
        ? fs.readlinkSync(buffer(file), { encoding: "buffer" }).toString("latin1")
        : fs.readFileSync(buffer(file)).toString("latin1")
  const seconds = String((lstat(file)?.mtimeNs ?? 0n) / 1_000_000_000n)
  const words = [tree.id, entry.type, entry.mode.toString(8), seconds, name, content]
  await context.session!.askBytes("file", ...words)
  context.report.bytesUp += content.length
}

/** Has the agent put an upload in its place; the manifest of the state after it waits until that is confirmed. */
function commitTree(context: Context, update: Update): Promise<unknown>[] {
  const { tree, delta, manifest } = update
  const session = context.session!
  const entries = distrustMoved(manifest.entries, delta.send)
  const isWhole = [...entries.values()].every(({ hash: contents }) => contents !== UNKNOWN)
  writeManifest(`${manifestFile(context, tree)}.next`, {
    ...manifest,
    entries,
    fingerprint: isWhole ? manifest.fingerprint : undefined,
  })
  const zeroed = (names: readonly Name[]) => names.map((name) => `./${name}\0`).join("")
  return [
    ...(delta.remove.length > 0 ? [session.askBytes("list", tree.id, "remove", zeroed(delta.remove))] : []),
    ...(delta.removeDirectories.length > 0
      ? [session.askBytes("list", tree.id, "rmdir", zeroed(delta.removeDirectories))]
      : []),
    ...(manifest.newest ? [session.ask("list", tree.id, "newest", manifest.newest)] : []),
    session.ask("commit", tree.id, manifest.token),
  ]
}

/** The newest mtime of a tree in seconds since 1970, its root included. */
function newestOf(tree: Tree, places: readonly Place[]): string {
  const stats = [lstat(bytes(tree.local)), ...places.map(({ stat }) => stat)]
  const newest = stats.reduce((most, stat) => (stat && stat.mtimeNs > most ? stat.mtimeNs : most), 0n)
  return String(newest / 1_000_000_000n)
}

/** Store paths that the command names by a link here: what the host lacks of their closures goes there. */
async function uploadStorePaths(context: Context): Promise<void> {
  const { storePaths } = context.plan
  if (storePaths.length === 0) return
  const { name } = context.plan.host
  const closure = lines(await capture(["nix-store", "--query", "--requisites", ...storePaths]))
  const missing = (await context.session!.ask("missing", ...closure)).map((line) => line.slice(2))
  if (missing.length === 0) return
  const sizes = lines(await captureEach(["nix-store", "--query", "--size"], missing)).map(Number)
  const progress = await startProgress(context, "store paths", sizes)
  const compress = await chooseCompression(context, sum(sizes))
  const script = `${REMOTE_PATH}${compress ? `${compress} -d -c | ` : ""}nix-store --import >/dev/null`
  const stages = [
    ["bash", "-c", "exec nix-store --export $(cat)"],
    ...(progress.counter ? [progress.counter] : []),
    ...(compress ? [[compress, "-1", "-c"]] : []),
    withScript(sshArguments(context), script),
  ]
  await execute(context, pipeline(...stages), {
    what: "upload of store paths",
    input: Buffer.from(missing.join("\n")),
    onErrors: progress.read,
    failure: (_, errors) =>
      /lacks a (valid )?signature/.test(errors)
        ? new EdictError(
            `the store on ${name} takes only signed paths from its user there, and of what the command names it lacks ${missing.length}, e.g. ${missing[0]}`,
            `sign them here by a key that is in trusted-public-keys on ${name}, and nix copy --to ssh://${context.plan.host.destination}. A trusted user there would do, too, but that is the same as root there`,
          )
        : undefined,
  }).finally(progress.end)
  context.report.bytesUp += sum(sizes)
}

/**
 * Locked inputs that the host lacks go into its store. They are added by their content, which every user there may do:
 * `nix-store --import` would take such paths, which nobody signed, from trusted users alone.
 */
async function uploadInputs(context: Context, inputs: readonly LockedInput[]): Promise<void> {
  const { host } = context.plan
  const sources = inputs.length > 0 ? await fetchInputs(context, inputs) : []
  if (sources.length === 0) return
  const paths = sources.map(({ source }) => source)
  const sizes = lines(await captureEach(["nix-store", "--query", "--size"], paths)).map(Number)
  const progress = await startProgress(context, "inputs", sizes)
  const compress = await chooseCompression(context, sum(sizes))
  const isGnu = (await capture(["tar", "--version"], "may-fail")).includes("GNU")
  // Directories of the store cannot be written; tars without root's rights may then fail to fill them.
  const tar = ["tar", ...(isGnu ? ["--mode=u+w"] : ["--format", "gnutar"]), "-cf", "-", "-C", "/nix/store"]
  const packing = [
    ["env", "COPYFILE_DISABLE=1", ...tar, "--", ...paths.map((source) => path.basename(source))],
    ...(progress.counter ? [progress.counter] : []),
    ...(compress ? [[compress, "-1", "-c"]] : []),
  ]
  const pairs = sources.map(({ source, path: place }) => `${path.basename(source)} ${place}`).join(" ")
  const head = [`${host.directory}/run/${context.run}`, compress ?? "-", encodeWord(pairs)]
  await execute(context, pipeline(...packing, withScript(sshArguments(context), INPUTS_SCRIPT, ...head)), {
    what: "upload of inputs",
    onErrors: progress.read,
    failure: (code, errors) =>
      code === 255 && !/No space left|Disk quota|^ssh: /m.test(errors)
        ? new EdictError(
            `the connection to ${host.name} was lost while inputs were on their way`,
            "run it again",
            SSH_FAILED,
          )
        : undefined,
  }).finally(progress.end)
  context.report.bytesUp += sum(sizes)
}

/** An input, and where its content lies in the store here. */
type InputSource = LockedInput & Readonly<{ source: string }>

/** Most inputs that are fetched at once. */
const FETCHED_AT_ONCE = 4

/** Finds inputs in the store here, or fetches them with what this side may. What it cannot fetch, the host has to. */
async function fetchInputs(context: Context, inputs: readonly LockedInput[]): Promise<InputSource[]> {
  if (!hasProgram("nix-store", context.env))
    throw new EdictError(
      "send-inputs needs Nix here, which fetches them",
      `install Nix, or -A in place of send-inputs in ${tableOf(context.plan.host.name)}`,
    )
  const absent = new Set(await invalidHere(inputs.map((input) => input.path)))
  const queue = inputs.filter((input) => absent.has(input.path))
  const fetched = new Map<string, string>()
  const done = queue.length > 0 ? context.steps.begin("fetch inputs here") : () => undefined
  const worker = async () => {
    for (let input = queue.shift(); input; input = queue.shift()) {
      const source = await fetchInput(context, input)
      if (source !== undefined) fetched.set(input.path, source)
    }
  }
  await Promise.all(Array.from({ length: FETCHED_AT_ONCE }, worker)).finally(done)
  return inputs.flatMap((input) => {
    const source = absent.has(input.path) ? fetched.get(input.path) : input.path
    return source === undefined ? [] : [{ ...input, source }]
  })
}

/** Fetches one input as flake.lock has it; undefined if that fails. Its address may hold a password: never an argument. */
async function fetchInput(context: Context, { name, locked }: LockedInput): Promise<string | undefined> {
  const { dir: _, ...attributes } = locked
  const json = JSON.stringify(JSON.stringify(attributes)).replaceAll("${", "\\${")
  const argv = ["nix-instantiate", "--extra-experimental-features", "nix-command flakes"]
  try {
    const answer = await execute(context, [...argv, "--eval", "--json", "--read-write-mode", "-"], {
      input: Buffer.from(`(builtins.fetchTree (builtins.fromJSON ${json})).outPath`),
      what: "fetching an input",
      failure: (_code, errors) => new EdictError(fetchFailure(errors)),
    })
    const source: unknown = JSON.parse(answer)
    if (typeof source === "string" && isStorePath(source)) return source
    throw new EdictError(`it came to lie at ${shown(answer)}`)
  } catch (error) {
    if (context.signal !== undefined) throw error
    const host = shown(context.plan.host.name)
    note(context, `input ${shown(name)} cannot be fetched here, so ${host} has to do it: ${reason(error)}`)
    return undefined
  }
}

/** The line of Nix's, or of the program that it used, that says why a fetch failed. */
function fetchFailure(errors: string): string {
  const said = plainLines(errors).map((line) => line.trim())
  const telling = said.find((line) => /denied|^fatal: |[Cc]ould not|verification failed|^error: ./.test(line))
  return withoutSecret(telling ?? said[0] ?? "it does not say why")
}

// ── 11. Run: the command, over there ────────────────────────────────────────────────────────────────────

/** How the command ended, and what the agent saw of its doing. */
type Outcome = Readonly<{
  exitCode: number
  closure: readonly StorePath[] // of the results that were not known to be here
  links: readonly ResultLink[]
  changes: ReadonlyMap<string, readonly Change[]>
  git: ReadonlyMap<string, GitChanges>
  unseen: readonly string[]
  unheard: boolean // the other side heard nothing from here for too long, and ended the command
}>

/** Milliseconds between two calls to the agent, which ends the command when it hears none: see its watchdog. */
const BEAT = 1000

/**
 * Runs the command with our standard streams. The agent's answer holds the exit code: ssh's own 255 could be
 * the command's, too.
 */
async function runCommand(context: Context, trees: readonly Tree[]): Promise<Outcome> {
  const plan = planOfRun(context)
  const session = context.session!
  const watched = trees.map((tree) => `${tree.id} ${tree.comesHome}\n`).join("")
  const directories = plan.linkDirectories.map(({ remote }) => `${remote}\n`).join("")
  const answer = session.ask(
    "run",
    COMMAND_SCRIPT,
    watched,
    directories,
    knownResults(plan)
      .map((known) => `${known}\n`)
      .join(""),
    ...encodeCommand(plan),
  )
  const takeBack = context.steps.lend()
  context.running = true
  const beat = setInterval(() => session.tell("alive"), BEAT)
  try {
    const ended = openCommandChannel(context)
    const report = await Promise.race([answer, ended.then((code) => lateAnswer(context, answer, code))])
    await ended
    return parseReport(report, plan)
  } finally {
    clearInterval(beat)
    context.running = false
    takeBack()
  }
}

/** The plan with what only this run has: the link for --materialize, and the directory where it appears over there. */
function planOfRun({ plan, run }: Context): Plan {
  const isOwnWord = (word: RemoteWord) => typeof word === "object" && "of" in word
  if (!plan.command.some(isOwnWord)) return plan
  const remote = linkPlace(plan.host, run)
  return {
    ...plan,
    command: plan.command.map((word) =>
      isOwnWord(word) ? { prefix: "", home: `${remote}/result`, suffix: "" } : word,
    ),
    linkDirectories: [...plan.linkDirectories, { local: plan.cwd.local, remote }],
  }
}

/** Whether Ctrl-C came after the command had ended. */
const isInterrupted = ({ ran }: Context): boolean => ran === "interrupted since"

const withoutResults = (host: Host): EdictError =>
  new EdictError(`interrupted; the results stay on ${host.name}`, "the same again", signalCode("SIGINT"))

/** The network stood still for longer than the watchdog over there waits, and then it went on. */
const endedUnheard = (host: Host): EdictError =>
  new EdictError(
    `${host.name} heard nothing from here for 6 seconds, and ended the command`,
    "the same again; what the command changed until then is here",
    SSH_FAILED,
  )

/** The channel of the command's standard streams; opened once, it waits over there for what it is to run. */
function openCommandChannel(context: Context): Promise<number> {
  const { plan } = context
  const terminal = plan.monitor === "none" && wantsTerminal(plan.options)
  const ssh = [
    ...commandArguments(context, terminal ? "-tt" : "-T"),
    commandLine(plan.host.directory, context.run),
  ]
  const argv = plan.monitor === "nom" ? shownByNom(ssh, plan.next ? "no input" : "our input") : ssh
  const isShown = plan.monitor === "nom" || plan.options.verbosity < 0 // by nom, or not at all
  const reads = isTerminal(0) && !(plan.monitor === "nom" && plan.next)
  return (context.channel ??= foreground(context, argv, {
    detached: context.multiplexed,
    keys: !reads ? "none" : terminal ? "each" : "lines",
    listenTo: isShown ? "nothing" : terminal ? "stdout" : "stderr",
  }))
}

/** nix-output-monitor, as it reads a log of the format internal-json on its standard input (nom 2.0 and later). */
const NOM = ["nom", "--json"]

/**
 * A command whose stderr goes to nom, and from there to ours (older ones print to stdout); stdout stays its own, and
 * so does the exit code. What nom leaves unread is printed as it is. Without input for what runs twice.
 */
function shownByNom(argv: readonly string[], input: "our input" | "no input"): string[] {
  const source = input === "no input" ? " </dev/null" : ""
  const script = `{ "$@" 2>&1 >&3 3>&-${source} | { ${NOM.join(" ")}; exec cat; } >&2 3>&-; exit "\${PIPESTATUS[0]}"; } 3>&1`
  return ["bash", "-c", script, "bash", ...argv]
}

/** Store paths that result links here lead to: their closures need not be named again. */
function knownResults(plan: Plan): string[] {
  const directories = [plan.cwd.local, ...plan.linkDirectories.map(({ local }) => local)]
  const namesIn = (directory: string) => (fs.existsSync(directory) ? fs.readdirSync(directory) : [])
  const links = directories.flatMap((directory) =>
    namesIn(directory)
      .filter((name) => name.startsWith("result"))
      .map((name) => linkText(path.join(directory, name))),
  )
  return [...new Set(links)].filter(
    (target): target is string => target !== undefined && isStorePath(target) && fs.existsSync(target),
  )
}

/** The command's ssh has ended: the agent's answer follows within seconds, or the connection is gone. */
async function lateAnswer(context: Context, answer: Promise<string[]>, code: number): Promise<string[]> {
  const lost = new Promise<never>((_, reject) => {
    const timer = setTimeout(
      () =>
        reject(
          new EdictError(
            `the connection to ${context.plan.host.name} was lost (ssh ended with ${code}); its changes come home with the next run`,
            "",
            SSH_FAILED,
          ),
        ),
      60_000,
    )
    timer.unref()
  })
  return await Promise.race([answer, lost])
}

/** A pty only when all three streams are terminals: it would merge stdout and stderr, and add carriage returns. */
function wantsTerminal(options: Options): boolean {
  if (options.tty !== "auto") return options.tty === "always"
  return [0, 1, 2].every((descriptor) => isTerminal(descriptor))
}

/** Directory, environment and words of the command, each with a letter for what it is, as COMMAND_SCRIPT reads them. */
export function encodeCommand(plan: Plan): string[] {
  const variables = Object.entries(plan.host.env).map(([name, value]) => `e${name}=${value}`)
  const words = plan.command.flatMap((word) => {
    if (typeof word === "string") return [`w${word}`]
    if ("update" in word) return [`u${word.update}`]
    return [`p${word.prefix}`, `h${word.home}`, `s${word.suffix}`]
  })
  return [`d${plan.cwd.remote}`, ...variables, ...plan.settings.map((line) => `c${line}`), ...words]
}

/**
 * The agent's report: `x CODE`; `l NUMBER NAME` and `tTARGET` for each link in a link directory; `d TREE` and
 * then the changes of that tree. Links into the store are results, wherever they are.
 */
function parseReport(answer: readonly string[], plan: Plan): Outcome {
  const trees = answer.flatMap((line, at) => (line.startsWith("d ") ? [{ id: line.slice(2), at }] : []))
  const end = trees[0]?.at ?? answer.length
  const changes = new Map(
    trees.map(({ id, at }, index) => [
      id,
      parseChanges(answer.slice(at + 1, trees[index + 1]?.at ?? answer.length)),
    ]),
  )
  const links = answer.slice(0, end).flatMap((line, at) => {
    const found = /^l (\d+) (.*)$/s.exec(line)
    if (!found || found[2]!.includes("/") || unsafeName(found[2]!) !== undefined) return []
    const directory = plan.linkDirectories[Number(found[1]) - 1]
    return directory
      ? [{ link: path.join(directory.local, text(found[2]!)), target: answer[at + 1]!.slice(1) }]
      : []
  })
  const inTrees = plan.trees
    .filter((tree) => tree.comesHome === "all")
    .flatMap((tree) =>
      (changes.get(tree.id) ?? [])
        .filter(
          (change) =>
            isStoreLink(change) &&
            unsafeName(change.name) === undefined &&
            parentProblem(bytes(rootHere(tree)), change.name) === undefined,
        )
        .map((change) => ({
          link: path.join(rootHere(tree), text(change.name)),
          target: text(change.target!),
        })),
    )
  const code = answer.find((line) => line.startsWith("x "))?.slice(2)
  const suffixed = (link: string) => path.join(path.dirname(link), suffixLink(path.basename(link), plan))
  return {
    closure: answer.flatMap((line) => {
      const found = /^c (\d+) (.*)$/s.exec(line)
      return found ? [{ path: found[2]!, size: Number(found[1]) }] : []
    }),
    exitCode: /^\d{1,3}$/.test(code ?? "") ? Number(code) : EDICT_FAILED,
    links: [...joinProfiles(links), ...inTrees].map((result) => ({ ...result, link: suffixed(result.link) })),
    changes,
    git: new Map(
      trees.map(({ id, at }, index) => [
        id,
        parseGitChanges(answer.slice(at + 1, trees[index + 1]?.at ?? answer.length)),
      ]),
    ),
    unseen: answer.filter((line) => line.startsWith("e ")).map((line) => line.slice(2)),
    unheard: answer.includes("q"),
  }
}

const isStorePath = (target: string): boolean =>
  /^\/nix\/store\/[0-9a-z]{32}-[A-Za-z0-9+._?=-]+$/.test(target)
const linksToStore = (file: string): boolean => isStorePath(linkText(text(file)) ?? "")
const isStoreLink = (change: Change): boolean =>
  change.what !== "deleted" && change.type === "link" && isStorePath(change.target ?? "")

/** With several hosts, `result-1-dev` of host a is `result-a-1-dev`: as if -o result-a had been given. */
export function suffixLink(name: string, plan: Pick<Plan, "linkPrefix" | "options">): string {
  const { linkPrefix, options } = plan
  if (options.materialize !== undefined) return name
  const rest = name.slice(linkPrefix.length)
  return name.startsWith(linkPrefix) && /^(-|$)/.test(rest)
    ? linkPrefix + options.linkSuffix + rest
    : name + options.linkSuffix
}

/** Lines of `differences` → one Change for each path; `tTEXT` and `nNAME` carry the texts of links. */
export function parseChanges(answer: readonly string[]): Change[] {
  const targets = new Map<Name, string>()
  const sides = new Map<Name, { old?: Listed; new?: Listed }>()
  const unescape = (name: string) => name.replaceAll("\u0001", "\n")
  for (const [at, line] of answer.entries()) {
    const following = answer[at + 1]
    if (line.startsWith("t") && following?.startsWith("n"))
      targets.set(nameOf(unescape(following.slice(1))), unescape(line.slice(1)))
    if (!/^[+-]/.test(line)) continue
    const listed = parseListed(line.slice(1))
    const name = nameOf(unescape(listed.name))
    if (name === "") continue
    sides.set(name, { ...sides.get(name), [line.startsWith("+") ? "new" : "old"]: listed })
  }
  return [...sides].map(([name, { old, new: now }]) => ({
    name,
    what: now === undefined ? "deleted" : old === undefined ? "created" : "changed",
    type: (now ?? old)!.type,
    mode: (now ?? old)!.mode,
    size: now?.size ?? 0,
    modeOnly: old !== undefined && now !== undefined && old.content === now.content && old.type === now.type,
    target: targets.get(name),
  }))
}

type Listed = Readonly<{ type: Change["type"]; mode: number; size: number; content: string; name: string }>

const nameOf = (listed: string): Name => (listed === "." ? "" : listed.replace(/^\.\//, ""))

/** One line of the remote listing: `f644/INODE/SIZE/MTIME/CTIME/./NAME` (GNU find) or `x81a4/…` (stat). */
function parseListed(line: string): Listed {
  const [kind, inode, size, mtime] = line.split("/", 5)
  const name = line.split("/").slice(5).join("/")
  const types: Record<string, Change["type"]> = {
    f: "file",
    l: "link",
    d: "directory",
    8: "file",
    a: "link",
    4: "directory",
  }
  const isStat = kind!.startsWith("x")
  const mode = isStat ? Number.parseInt(kind!.slice(1), 16) : Number.parseInt(kind!.slice(1), 8)
  const type = types[isStat ? (mode >> 12).toString(16) : kind![0]!] ?? "other"
  const bytesLong = /^\d{1,15}$/.test(size ?? "") ? Number(size) : 0
  return { type, mode: mode & 0o7777, size: bytesLong, content: `${inode} ${size} ${mtime}`, name }
}

// ── 12. Results: links that the command made, with their closures ───────────────────────────────────────

/** Brings the closures of result links here, then makes the links as gc roots. */
async function fetchResults(context: Context, outcome: Outcome): Promise<void> {
  const { report, plan } = context
  if (outcome.links.length === 0) return
  if (!hasProgram("nix-store", context.env)) {
    note(
      context,
      `the files of a result come without Nix, too: edict --materialize DIR ${shellQuote(plan.host.name)} …`,
    )
    for (const { link, target } of outcome.links)
      note(context, `no nix here: ${shown(path.basename(link))} is ${target} on ${plan.host.name}`)
    return
  }
  const targets = [...new Set(outcome.links.map(({ target }) => target))]
  if ((await invalidHere(targets)).length > 0)
    await fetchClosures(context, { targets, paths: outcome.closure })
  const blocked: EdictError[] = []
  const refused = await refusedLinks(plan, outcome.links)
  for (const { link, target, isProfile } of outcome.links) {
    const text = linkText(link)
    const free =
      text === undefined
        ? !lstat(bytes(link))
        : text.startsWith("/nix/store/") || (isProfile === true && isGeneration({ link, target: text }))
    const why = refused.get(link)
    if (why)
      blocked.push(new EdictError(`${shown(link)} ${why}, so it was not made; the result is ${target}`))
    else if (!free)
      blocked.push(
        new EdictError(
          `${shown(link)} is no link into the store, so it stays; the result is ${target}`,
          `mv ${shellQuote(link)} ${shellQuote(`${link}.mine`)} && nix-store --realise ${target} --add-root ${shellQuote(link)} --indirect`,
        ),
      )
    else
      await linkResult(context, { link, target, isProfile }).catch(async (error) => {
        // Garbage collection here may have taken it before it had a root.
        if ((await invalidHere([target])).length === 0) throw error
        await fetchClosures(context, { targets, paths: [] })
        await linkResult(context, { link, target, isProfile })
      })
  }
  if (blocked[0]) throw blocked[0]
  const made = report.resultLinks.map(({ link, target }) => `${nameHere(plan.cwd.local, link)} -> ${target}`)
  for (const line of made) noteHome(context, line)
}

/** A path here for people, from the current directory. */
const nameHere = (cwd: string, link: string): string => shown(path.relative(cwd, link))

/** A link here that is a gc root; Nix replaces only links into the store. */
async function linkResult(context: Context, { link, target, isProfile }: ResultLink): Promise<void> {
  fs.mkdirSync(path.dirname(link), { recursive: true })
  const derivation = `(import "${target}") // { outputName = "out"; }` // realising it would build it here
  if (isProfile) await capture(["nix-env", "--profile", link, "--set", target])
  else if (isDerivation(target))
    await capture(["nix-instantiate", "--expr", derivation, "--add-root", link, "--indirect"])
  else await capture(["nix-store", "--realise", target, "--add-root", link, "--indirect"])
  context.report.resultLinks.push({ link, target })
}

/** Whether a link leads to one of its own generations, as those of profiles do: `p -> p-7-link`. */
const isGeneration = ({ link, target }: ResultLink): boolean =>
  target.startsWith(`${path.basename(link)}-`) &&
  /^\d+-link$/.test(target.slice(path.basename(link).length + 1))

/** The links into the store; a profile and its generation as one, as generations are numbered on each side. */
function joinProfiles(links: readonly ResultLink[]): ResultLink[] {
  const generationOf = ({ link, target }: ResultLink) =>
    links.find((other) => isStorePath(other.target) && other.link === path.join(path.dirname(link), target))
  const profiles = links.filter((link) => isGeneration(link) && generationOf(link))
  const generations = new Set(profiles.map(generationOf))
  return [
    ...links.filter((link) => isStorePath(link.target) && !generations.has(link)),
    ...profiles.map((profile) => ({ ...profile, target: generationOf(profile)!.target, isProfile: true })),
  ]
}

/** Which of these store paths are not valid here. */
async function invalidHere(paths: readonly string[]): Promise<string[]> {
  return lines(await captureEach(["nix-store", "--check-validity", "--print-invalid"], paths))
}

/** Runs a local command with store paths as further words; as often as so many words need. */
async function captureEach(
  argv: readonly string[],
  paths: readonly string[],
  failure: "may-fail" | "throws" = "throws",
): Promise<string> {
  return await capture(["xargs", ...argv], failure, Buffer.from(paths.join("\n")))
}

const isDerivation = (path: string): boolean => path.endsWith(".drv")

type StorePath = Readonly<{ path: string; size: number }> // size of its NAR in bytes, 0 if not known

/** Brings closures here: what the substitutes here have from there, the rest from the host in one stream. */
async function fetchClosures(
  context: Context,
  closure: { targets: readonly string[]; paths: readonly StorePath[] },
  isRetry = false,
): Promise<void> {
  const { host } = context.plan
  const named = closure.paths.length > 0 ? closure.paths : await askClosure(context, closure.targets)
  const odd = [...closure.targets, ...named.map(({ path }) => path)].find((line) => !isStorePath(line))
  if (odd !== undefined) throw new EdictError(`${host.name} named ${shown(odd)} as a store path`)
  const sizes = new Map(named.map(({ path, size }) => [path, size]))
  let missing = await invalidHere([...sizes.keys()])
  if (host.substitute && missing.length > 0) {
    // Realising a derivation would build it.
    const plain = missing.filter((path) => !isDerivation(path))
    await captureEach(["nix-store", "--realise", "--keep-going"], plain, "may-fail")
    missing = await invalidHere(missing)
  }
  if (missing.length === 0) return
  const way = await chooseWay(context, missing)
  const work = missing.map((path) => ({ path, size: sizes.get(path) ?? 0 }))
  const progress = await startProgress(
    context,
    "store paths",
    work.map(({ size }) => size),
  )
  // sudo may ask for a password.
  const release = way === "sudo" ? context.steps.hold("until bytes flow") : () => undefined
  try {
    if (way === "signed") await copySigned(context, closure.targets)
    else await streamPaths(context, { way, missing: work, progress })
    context.report.bytesDown += sum(work.map(({ size }) => size))
  } catch (error) {
    // Garbage collection here may have taken what the missing paths refer to.
    const vanished = (await invalidHere([...sizes.keys()])).some((path) => !missing.includes(path))
    if (isRetry || !vanished) throw error
    progress.end()
    await fetchClosures(context, { ...closure, paths: named }, true)
  } finally {
    progress.end()
    release()
  }
}

/** The closure of store paths, asked of the host. */
async function askClosure(context: Context, targets: readonly string[]): Promise<StorePath[]> {
  const script = `${REMOTE_PATH}paths=$(nix-store --query --requisites ${targets.filter(isStorePath).join(" ")}) || exit
printf '%s\\n' "$paths" | xargs nix-store --query --size | { printf '%s\\n' "$paths"; echo; cat; }`
  const answer = await execute(context, [...sshArguments(context), BOOT_LINE], {
    input: Buffer.from(`${encodeScript(script)}\n`),
    what: "closure of the result",
  })
  const [paths = "", sizes = ""] = answer.split("\n\n")
  const known = lines(sizes).map(Number)
  return lines(paths).map((path, at) => ({ path, size: known[at] ?? 0 }))
}

/**
 * Paths that come in one go: `nix-store --import` takes any number, but each of them it first reads into memory; a
 * large one streams through `nix copy`, which also is three times as fast.
 */
type PathBatch = Readonly<{ carrier: "export" | "nar"; paths: readonly StorePath[] }>

/** Bytes of a NAR from which a path is a batch of its own: the round trips that this costs no longer count then. */
const LARGE_PATH = 64 * 2 ** 20

/** Missing paths, references before referrers → batches, in an order that is still that one. */
export function batchesOf(missing: readonly StorePath[]): PathBatch[] {
  const batches: { carrier: PathBatch["carrier"]; paths: StorePath[] }[] = []
  for (const path of missing) {
    const last = batches.at(-1)
    if (path.size >= LARGE_PATH && !isDerivation(path.path)) batches.push({ carrier: "nar", paths: [path] })
    else if (last?.carrier === "export") last.paths.push(path)
    else batches.push({ carrier: "export", paths: [path] })
  }
  return batches
}

/** Streams missing paths into the store here: the same few round trips for one small path and for a thousand. */
async function streamPaths(
  context: Context,
  work: { way: "stream" | "sudo"; missing: readonly StorePath[]; progress: Progress },
): Promise<void> {
  const compress = await chooseCompression(context, sum(work.missing.map(({ size }) => size)))
  // sudo may allow no more than nix-store.
  const batches: PathBatch[] =
    work.way === "sudo" ? [{ carrier: "export", paths: work.missing }] : batchesOf(work.missing)
  const large = batches.filter(({ carrier }) => carrier === "nar").flatMap(({ paths }) => paths)
  const infos = large.length > 0 ? await askPathInfos(context, large) : new Map<string, string>()
  let done = 0
  for (const { carrier, paths } of batches) {
    const before = done
    const read = (chunk: string) => work.progress.read(chunk, before)
    const how = { way: work.way, compress, progress: { ...work.progress, read } }
    if (carrier === "export") await streamExport(context, paths, how)
    else for (const { path } of paths) await streamNar(context, { path, info: infos.get(path) }, how)
    done += sum(paths.map(({ size }) => size))
  }
}

type Streaming = Readonly<{ way: "stream" | "sudo"; compress?: string; progress: Progress }>

/** One export over there, one import here. */
async function streamExport(context: Context, paths: readonly StorePath[], how: Streaming): Promise<void> {
  const script = `nix-store --export ${paths.map(({ path }) => path).join(" ")}`
  // sudo has a PATH of its own.
  const sudo = ["sudo", Bun.which("nix-store", { PATH: context.env.PATH ?? "" })!]
  await streamFrom(
    context,
    { script, into: [...(how.way === "sudo" ? sudo : ["nix-store"]), "--import"] },
    how,
  )
}

/** One path as a NAR, which `nix copy` here takes for the only one of a binary cache: it reads it as it comes. */
async function streamNar(
  context: Context,
  { path: storePath, info }: { path: string; info: string | undefined },
  how: Streaming,
): Promise<void> {
  if (info === undefined) throw new EdictError(`${context.plan.host.name} knows nothing of ${storePath}`)
  const cache = fs.mkdtempSync(path.join(os.tmpdir(), "edict-nar-"))
  try {
    fs.mkdirSync(path.join(cache, "nar"))
    fs.symlinkSync("/dev/stdin", path.join(cache, NAR_NAME))
    fs.writeFileSync(path.join(cache, "nix-cache-info"), "StoreDir: /nix/store\n")
    fs.writeFileSync(path.join(cache, `${path.basename(storePath).slice(0, 32)}.narinfo`), info)
    const copy = [...NIX_COMMAND, "copy", "--quiet", "--no-recursive", "--no-check-sigs"]
    const into = [...copy, "--from", `file://${encodeURI(cache)}`, storePath]
    await streamFrom(context, { script: `nix-store --dump ${storePath}`, into }, how)
  } finally {
    fs.rmSync(cache, { recursive: true, force: true })
  }
}

const NAR_NAME = "nar/stream.nar"

/** What a command over there prints, through compression and a counter if wanted, into one here. */
async function streamFrom(
  context: Context,
  { script, into }: { script: string; into: string[] },
  { compress, progress }: Streaming,
): Promise<void> {
  const stages = [
    [...sshArguments(context), BOOT_LINE],
    ...(compress ? [[compress, "-d", "-c"]] : []),
    ...(progress.counter ? [progress.counter] : []),
    into,
  ]
  const compressed = compress ? `${script} | ${compress} -1 -c` : script
  await execute(context, pipeline(...stages), {
    input: Buffer.from(`${encodeScript(`${REMOTE_PATH}${compressed}`)}\n`),
    what: "retrieval of the result",
    onErrors: (chunk) => progress.read(chunk),
    failure: (code) =>
      code === 255
        ? new EdictError(
            `the connection to ${context.plan.host.name} was lost while the result was on its way`,
            "the same again: what has come stays, the rest follows",
            SSH_FAILED,
          )
        : undefined,
  })
}

/** The texts that a binary cache has on paths, asked of the host in one go. */
async function askPathInfos(context: Context, paths: readonly StorePath[]): Promise<Map<string, string>> {
  const script = `${REMOTE_PATH}exec nix-store --dump-db ${paths.map(({ path }) => path).join(" ")}`
  const answer = await execute(context, [...sshArguments(context), BOOT_LINE], {
    input: Buffer.from(`${encodeScript(script)}\n`),
    what: "what there is to know of the result",
  })
  return parseRegistrations(answer)
}

/**
 * What `nix-store --dump-db` prints (Nix 2.8 to 2.34: path, SHA-256 in base 16, size, deriver or nothing, how many
 * references, and these, a line each) → the texts of .narinfo files. What does not look like it ends the list.
 */
export function parseRegistrations(answer: string): Map<string, string> {
  const infos = new Map<string, string>()
  const left = answer.split("\n")
  while (left.length >= 5) {
    const [storePath, hash, size, deriver, count] = left.splice(0, 5) as [
      string,
      string,
      string,
      string,
      string,
    ]
    const references = left.splice(0, Number(count))
    const wellFormed =
      [storePath, ...references, ...(deriver === "" ? [] : [deriver])].every(isStorePath) &&
      /^[0-9a-f]{64}$/.test(hash) &&
      /^\d+$/.test(size) &&
      references.length === Number(count)
    if (!wellFormed) break
    const lines = [
      `StorePath: ${storePath}`,
      `URL: ${NAR_NAME}`,
      "Compression: none",
      `NarHash: sha256:${hash}`,
      `NarSize: ${size}`,
      `References: ${references.map((reference) => path.basename(reference)).join(" ")}`,
      ...(deriver === "" ? [] : [`Deriver: ${path.basename(deriver)}`]),
    ]
    infos.set(storePath, `${lines.join("\n")}\n`)
  }
  return infos
}

/** `nix copy` asks for path after path, but it carries signatures, and a store that trusts nobody takes no others. */
async function copySigned(context: Context, targets: readonly string[]): Promise<void> {
  const facts = await context.session!.greeting
  const program = [...facts].find((fact) => fact.startsWith("store "))?.slice("store ".length)
  const from = `ssh://${context.plan.host.destination}${program && /^[A-Za-z0-9._/-]+$/.test(program) ? `?remote-program=${program}` : ""}`
  // Nix splits the options at blanks; on the open connection only its socket matters.
  const { plan } = context
  const bare = { ...context, plan: { ...plan, host: { ...plan.host, sshOptions: [] } } }
  const ssh = sshProgram(context.multiplexed ? bare : context)
  const environment = ["env", `NIX_SSHOPTS=${ssh.slice(1).join(" ")}`]
  const options = context.plan.host.requireSignatures ? ["--option", "require-sigs", "true"] : []
  const copy = [...environment, ...NIX_COMMAND, "copy", ...options, "--from", from]
  const [derivations, plain] = partition(targets, isDerivation)
  const what = "retrieval of the result"
  if (plain.length > 0) await execute(context, [...copy, ...plain], { what })
  if (derivations.length > 0) await execute(context, [...copy, "--derivation", ...derivations], { what })
}

const NIX_COMMAND = ["nix", "--extra-experimental-features", "nix-command"]

/**
 * How missing paths may come: streamed, where this user is trusted by the store here (or through sudo, where the
 * config says so), else with signatures. Found out before anything is transferred: the daemon refuses unsigned paths
 * only after it has read them (Nix issue 1761).
 */
async function chooseWay(
  context: Context,
  missing: readonly string[],
): Promise<"stream" | "sudo" | "signed"> {
  const { host } = context.plan
  if (!host.requireSignatures) {
    if (ownsStore(context.env)) return "stream"
    if (host.import === "sudo") return "sudo"
    if (await isTrustedHere(context.env)) return "stream"
  }
  const settings = await settingsHere(context.env)
  if (!host.requireSignatures && settings["require-sigs"] === false) return "stream"
  const plain = missing.filter((path) => !isDerivation(path)) // derivations need no signature
  if (plain.length === 0) return "signed"
  const keys = new Set(
    [settings["trusted-public-keys"] ?? []].flat().map((key) => String(key).split(":")[0]!),
  )
  const script = `${REMOTE_PATH}exec nix --extra-experimental-features nix-command path-info --sigs ${plain.join(" ")}`
  const answer = lines(
    await execute(context, [...sshArguments(context), BOOT_LINE], {
      input: Buffer.from(`${encodeScript(script)}\n`),
      what: "signatures of the result",
    }),
  )
  const unsigned = unsignedPaths(answer, keys)
  if (unsigned.length === 0) return "signed"
  throw new EdictError(
    `the store here takes only signed paths${host.requireSignatures ? " from this host (require-signatures)" : " from this user"}, and ${unsigned.length} of ${missing.length} have no signature by a key that is trusted here, e.g. ${unsigned[0]}`,
    `one of: sign on ${host.name} (secret-key-files in its nix.conf, the public key in trusted-public-keys here); import = "sudo" for the host in the config; --no-link, which leaves the result there. A trusted user of the store here would do, too, but that is the same as root`,
  )
}

/** Lines of `nix path-info --sigs` (PATH, then words: ultimate, ca:…, KEY:SIGNATURE) → paths that no trusted key signed. */
export function unsignedPaths(answer: readonly string[], keys: ReadonlySet<string>): string[] {
  return answer
    .map((line) => line.trim().split(/\s+/))
    .filter(([, ...words]) => !words.some((word) => word.startsWith("ca:") || keys.has(word.split(":")[0]!)))
    .map(([path]) => path!)
}

/** Nix's settings here: `config show` since 2.20, `show-config` before. A daemon does not care for those of its users. */
async function settingsHere(env: Env): Promise<Record<string, unknown>> {
  const ofSystem = ownsStore(env) ? [] : ["env", "NIX_USER_CONF_FILES=", "NIX_CONFIG="]
  for (const command of [["config", "show"], ["show-config"]]) {
    const answer = await capture([...ofSystem, ...NIX_COMMAND, ...command, "--json"], "may-fail")
    if (!answer.startsWith("{")) continue
    const settings = JSON.parse(answer) as Record<string, { value?: unknown }>
    return Object.fromEntries(Object.entries(settings).map(([name, setting]) => [name, setting.value]))
  }
  return {}
}

/** Whether this user writes to the store here without a daemon, or has the rights of one. */
const ownsStore = (env: Env): boolean =>
  process.getuid?.() === 0 || ((env.NIX_REMOTE ?? "") !== "daemon" && canWrite("/nix/var/nix/db"))

/** Whether the daemon here takes unsigned paths from this user. */
async function isTrustedHere(env: Env): Promise<boolean> {
  const info = await capture([...NIX_COMMAND, "store", "info", "--json"], "may-fail")
  if (info.startsWith("{")) return /"trusted":\s*(1|true)/.test(info)
  // Before Nix 2.15 the daemon does not say it; the settings that it and its clients read do.
  const trusted = [(await settingsHere(env))["trusted-users"] ?? []].flat().map(String)
  const [user, groups] = await Promise.all([capture(["id", "-un"]), capture(["id", "-Gn"])])
  return trusted.some(
    (name) =>
      name === "*" ||
      name === user.trim() ||
      (name.startsWith("@") && groups.trim().split(" ").includes(name.slice(1))),
  )
}

/** The program that compresses a stream of some bytes, if one should: on request, or by itself where the way is not short. */
async function chooseCompression(context: Context, size: number): Promise<"zstd" | "gzip" | undefined> {
  const { compress } = context.plan.host
  const facts = await context.session!.greeting
  const both = (["zstd", "gzip"] as const).find(
    (program) => facts.has(`${program} yes`) && hasProgram(program, context.env),
  )
  if (compress !== "auto") return compress ? both : undefined
  if (both !== "zstd" || size < WORTH_COMPRESSING) return undefined
  const began = performance.now()
  await context.session!.ask("again")
  return performance.now() - began > SHORT_WAY ? both : undefined
}

/** Bytes below which a stream is not worth the question how long the way is. */
const WORTH_COMPRESSING = 256 * 1024

/** Milliseconds of a round trip below which a stream is faster uncompressed. */
const SHORT_WAY = 10

// Plain files (--materialize): what result links lead to, as `cp -rL` copies it. The other side lists store paths,
// this one decides what lies where, and each file travels once, as changes do.

/** A result, and its name in the directory where there are several. */
export type Output = Readonly<{ name: Name; target: string }>

/** What is known of the store over there: paths below /nix/store, and the store paths that were asked for. */
export type Listing = Readonly<{ asked: ReadonlySet<string>; entries: ReadonlyMap<Name, Change> }>

/** A path to make here. The bytes of a file lie at `source`, below /nix/store over there. */
type Laid = Readonly<{
  name: Name
  type: "file" | "link" | "directory"
  source: Name
  size: number
  mode: number
  target: string // text of a link
}>

/** `skipped`: names that are not made, and why. `unlisted`: store paths that have to be listed first. */
export type Layout = Readonly<{
  laid: readonly Laid[]
  skipped: ReadonlyMap<Name, string>
  unlisted: readonly string[]
}>

type Walk = {
  readonly listing: Listing
  readonly children: ReadonlyMap<Name, ReadonlySet<Name>>
  readonly laid: Laid[]
  readonly skipped: Map<Name, string>
  readonly unlisted: Set<string>
  readonly open: Map<Name, Name> // directories of the store that are being walked, and what they become here
  root: Name // the output that is being walked
  alone: Name // what a single file is called
}

/** More paths than any result has, unless its links branch anew at each step. */
const MOST_PATHS = 500_000

/** How often links may lead to store paths that were not asked for yet, and a path through a link. */
const MOST_LISTINGS = 500
const MOST_LINKS = 40

/** Bytes of a path below the directory; PATH_MAX is 4096. */
const LONGEST_PATH = 3500

/** Throws UsageError unless nothing is here under this name, or an empty directory. */
function checkFree(name: string, cwd: string): void {
  const directory = path.resolve(cwd, name)
  const isEmpty = fs.existsSync(directory) && isEmptyDirectory(directory)
  if (!isEmpty && lstat(bytes(directory))) {
    const old = shown(name.replace(/(?<=.)\/+$/, ""))
    const move = `mv ${shellQuote(old)} ${shellQuote(`${old}.old`)}   # or name another one`
    throw new UsageError(
      `--materialize: ${shown(name)} is there already, and is no empty directory`,
      `${cwd}/`.startsWith(`${directory}/`)
        ? "--materialize out   # a directory that is not there yet"
        : move,
    )
  }
  const parent = existingParent(isEmpty ? directory : path.dirname(directory))
  if (!fs.statSync(parent).isDirectory() || !canWrite(parent))
    throw new UsageError(
      `--materialize: ${shown(name)} cannot be made: nothing can be written to ${shown(parent)}`,
      "name a directory where you can write",
    )
}

const isEmptyDirectory = (directory: string): boolean =>
  fs.statSync(directory).isDirectory() && fs.readdirSync(directory).length === 0

function existingParent(directory: string): string {
  return fs.existsSync(directory) ? directory : existingParent(path.dirname(directory))
}

/** Brings the files of the results into a directory here, in place of links and store paths. */
async function materialize(context: Context, outcome: Outcome, name: string): Promise<void> {
  const { plan, report } = context
  if (outcome.links.length === 0 && outcome.exitCode !== 0) return
  if (outcome.links.length === 0)
    throw new EdictError(
      `nothing to put into ${shown(name)}: the command made no result link`,
      `edict --materialize ${shellQuote(shown(name))} ${shellQuote(plan.host.name)} nix build …`,
    )
  const outputs = nameOutputs(outcome.links)
  const { laid, skipped } = await layOutResults(context, outputs)
  if (laid.length === 0)
    throw new EdictError(`${plan.host.name} has no file of ${outputs[0]!.target}`, "run it again")
  const directory = path.resolve(plan.cwd.local, name)
  await putFiles(context, laid, directory).catch((error: unknown) => {
    throw asEdictError(error, `the files of the result cannot be put into ${shown(name)}`)
  })
  const sizes = laid.filter(({ type }) => type === "file").map(({ size }) => size)
  const left = [...skipped].map(([file, why]) => [text(file), text(why)] as const).toSorted()
  report.materialized = {
    directory,
    files: sizes.length,
    bytes: sum(sizes),
    skipped: Object.fromEntries(left),
  }
  for (const [file, why] of left.slice(0, 8)) note(context, `left out: ${shown(file)}: it ${shown(why)}`)
  if (left.length > 8) note(context, `left out: ${left.length - 8} more, which --report names`)
  const of = outputs.length === 1 ? outputs[0]!.target : outputs.map((output) => text(output.name)).join(", ")
  const size =
    sum(sizes) < 2 ** 20 ? `${Math.ceil(sum(sizes) / 1024)} KiB` : `${Math.ceil(sum(sizes) / 2 ** 20)} MiB`
  noteHome(
    context,
    `${shown(name)} holds ${sizes.length} file${sizes.length === 1 ? "" : "s"} (${size}) of ${shown(of)}`,
  )
}

/** Results by the names of their links; those of links in several directories may need a number. */
function nameOutputs(links: readonly ResultLink[]): Output[] {
  const names = new Map<Name, string>()
  for (const { link, target } of links) {
    const name = bytes(path.basename(link))
    let free = name
    for (let number = 2; names.has(free); number++) free = `${name}-${number}`
    names.set(free, target)
  }
  return [...names].toSorted().map(([name, target]) => ({ name, target }))
}

/** What to make of the results, after all store paths were listed that their links lead to. */
async function layOutResults(context: Context, outputs: readonly Output[]): Promise<Layout> {
  let listing: Listing = { asked: new Set(), entries: new Map() }
  for (let round = 0; round < MOST_LISTINGS; round++) {
    const layout = layOut(outputs, listing)
    if (layout.unlisted.length === 0) return layout
    const found = await listOutputs(context, layout.unlisted)
    listing = {
      asked: new Set([...listing.asked, ...layout.unlisted]),
      entries: new Map([...listing.entries, ...found.map((entry) => [entry.name, entry] as const)]),
    }
  }
  throw new EdictError(`the links of the result on ${context.plan.host.name} lead on and on`)
}

/** Everything below some store paths (without /nix/store/), asked of the host. */
async function listOutputs(context: Context, names: readonly string[]): Promise<Change[]> {
  const { name: host } = context.plan.host
  const stages = [
    [...sshArguments(context), BOOT_LINE],
    ["head", "-c", String(ANSWER_LIMIT)],
  ]
  const answer = lines(
    await execute(context, pipeline(...stages), {
      input: Buffer.from(`${encodeScript(OUTPUTS_SCRIPT)}\n${encodeWord(names.join("\n"))}\n`),
      what: "listing of the result",
    }),
  )
  if (answer.at(-1) !== "end") throw new EdictError(`${host} did not list all of the result`, "run it again")
  const found = parseChanges(answer.filter((line) => /^[+tn]/.test(line)))
  const odd = found.find(({ name }) => !names.includes(name.split("/", 1)[0]!))
  if (odd) throw new EdictError(`${host} named ${shown(text(odd.name))} as part of the result`)
  return found
}

/**
 * What lies where when links are followed within the store: one output fills the directory (a single file keeps its
 * name without the hash), several lie below the names of their links. A link that leads nowhere, out of the store or
 * in a circle stays one if it is relative and leads to a place of its own output; others are left out.
 * Throws EdictError for more paths than any result has.
 */
export function layOut(outputs: readonly Output[], listing: Listing): Layout {
  const children = new Map<Name, Set<Name>>()
  for (const name of listing.entries.keys()) {
    const parent = path.posix.dirname(name)
    const known = children.get(parent) ?? new Set()
    children.set(parent, known.add(name.slice(parent.length + 1)))
  }
  const lists = { laid: [], skipped: new Map(), unlisted: new Set<string>(), open: new Map() }
  const walk: Walk = { listing, children, ...lists, root: "", alone: "" }
  for (const { name, target } of outputs) {
    walk.root = outputs.length === 1 ? "" : name
    walk.alone = target.replace(/^\/nix\/store\/[^-]*-/, "")
    const why = unsafeName(walk.root || walk.alone)
    if (why) walk.skipped.set(name, why)
    else follow(walk, walk.root, { at: target, text: target })
  }
  return { ...walk, unlisted: [...walk.unlisted] }
}

/** Lays out under `name` what lies at `source` over there. */
function lay(walk: Walk, name: Name, source: Name): void {
  const { type, size, mode, target = "" } = walk.listing.entries.get(source)!
  if (walk.laid.length >= MOST_PATHS)
    throw new EdictError(`the result has more than ${MOST_PATHS} paths when its links are followed`)
  if (walk.open.has(source)) return void walk.skipped.set(name, "leads in a circle")
  if (type === "link") return follow(walk, name, { at: `/nix/store/${source}`, text: target })
  if (type === "other") return void walk.skipped.set(name, "is no file, directory or link")
  if (type === "file")
    return void walk.laid.push({ name: name || walk.alone, type, source, size, mode, target: "" })
  walk.laid.push({ name, type, source, size: 0, mode, target: "" })
  walk.open.set(source, name)
  for (const child of walk.children.get(source) ?? []) {
    const inner = name === "" ? child : `${name}/${child}`
    const isOne = !child.includes("/") && inner.length < LONGEST_PATH
    const why = isOne ? unsafeName(child) : "is no path that can be made here"
    if (why) walk.skipped.set(inner.slice(0, LONGEST_PATH), why)
    else lay(walk, inner, `${source}/${child}`)
  }
  walk.open.delete(source)
}

/** Lays out what a link leads to, or the link itself, or nothing. */
function follow(walk: Walk, name: Name, link: { at: string; text: Name }): void {
  const found = resolveInStore(walk.listing, link.at)
  if ("unlisted" in found) return void walk.unlisted.add(found.unlisted)
  const above = "source" in found ? walk.open.get(found.source) : undefined
  if ("source" in found && above === undefined) return lay(walk, name, found.source)
  const place = relativePlace(name, link.text)
  const isInner = walk.root === "" ? place !== "" : isWithin(place ?? "", walk.root)
  const stays = place !== undefined && (above === undefined ? isInner : place === above)
  if (stays) walk.laid.push({ name, type: "link", source: "", size: 0, mode: 0o777, target: link.text })
  else walk.skipped.set(name, `${"why" in found ? found.why : "leads in a circle"} (${link.text})`)
}

/** What a relative link means, if it leads to a place of the directory by going up first and then down. */
function relativePlace(name: Name, target: Name): Name | undefined {
  const parts = target.split("/").filter((part) => part !== "" && part !== ".")
  const down = parts.findIndex((part) => part !== "..")
  if (target === "" || target.startsWith("/") || (down >= 0 && parts.includes("..", down))) return undefined
  const place = path.posix.join(path.posix.dirname(name), target)
  return /^\.\.(\/|$)/.test(place) ? undefined : place.replace(/^\.$|\/$/, "")
}

type Resolved = Readonly<{ source: Name } | { unlisted: string } | { why: string }>

/** Follows all links of a path, as far as they lead through the store. */
function resolveInStore(listing: Listing, from: string): Resolved {
  const rest = from.split("/").reverse()
  const done: Name[] = []
  let links = 0
  while (rest.length > 0) {
    const part = rest.pop()!
    if (part === "" || part === ".") continue
    if (part === "..") done.pop()
    else done.push(part)
    if (part === ".." || done.length < 3 || done[0] !== "nix" || done[1] !== "store") continue
    if (done.length === 3 && !listing.asked.has(part))
      return isStorePath(`/nix/store/${part}`) ? { unlisted: part } : { why: "leads nowhere" }
    const entry = listing.entries.get(done.slice(2).join("/"))
    if (entry === undefined || (entry.type !== "directory" && entry.type !== "link" && rest.length > 0))
      return { why: "leads nowhere" }
    if (entry.type !== "link") continue
    if (++links > MOST_LINKS) return { why: "leads in a circle" }
    const target = (entry.target ?? "").slice(0, 4096)
    if (target.startsWith("/")) done.length = 0
    else done.pop()
    rest.push(...target.split("/").reverse())
  }
  const isInStore = done.length > 2 && done[0] === "nix" && done[1] === "store"
  return isInStore ? { source: done.slice(2).join("/") } : { why: "leads out of the store" }
}

/** Fetches the files into a private directory beside their place, and puts them there when all have come. */
async function putFiles(context: Context, laid: readonly Laid[], directory: string): Promise<void> {
  const isThere = fs.existsSync(directory)
  const parent = isThere ? directory : path.dirname(directory)
  fs.mkdirSync(parent, { recursive: true })
  const stage = `${bytes(parent)}/.edict-stage-${randomName()}`
  const remove = () => removeAll(stage)
  process.on("exit", remove)
  try {
    for (const inner of ["", "/in"]) fs.mkdirSync(buffer(stage + inner), { mode: 0o700 })
    const wanted = isCaseInsensitive(stage) ? withoutCollisions(laid) : laid
    const arrived = await fetchSources(context, wanted, stage)
    arrange(stage, { laid: wanted, arrived, host: context.plan.host.name })
    if (!isThere) return fs.renameSync(buffer(`${stage}/out`), directory)
    const others = fs.readdirSync(directory).filter((name) => name !== path.basename(stage))
    if (others.length > 0)
      throw new EdictError(`${shown(directory)} is no longer empty`, "run it again with another directory")
    moveInto(`${stage}/out`, bytes(directory))
  } finally {
    remove()
    process.off("exit", remove)
  }
}

/**
 * Moves what lies in one directory into another (paths byte by byte). What appeared there meanwhile is not replaced,
 * unless it is an empty directory: throws EEXIST, ENOTDIR or ENOTEMPTY then.
 */
export function moveInto(from: Name, directory: Name): void {
  for (const name of fs.readdirSync(buffer(from), { encoding: "latin1" })) {
    const [source, to] = [`${from}/${name}`, `${directory}/${name}`]
    if (lstat(source)?.isDirectory()) moveFile(source, to)
    else linkOrCopy(source, to)
  }
}

/** Without paths that are another one's file here, and what would lie in them. */
function withoutCollisions(laid: readonly Laid[]): Laid[] {
  const twins = collisions(laid.map(({ name }) => name))
  return laid.filter(({ name }) => ![name, ...parentsOf(name)].some((one) => twins.has(one)))
}

/** Brings each file once, under its name below /nix/store; answers the names of what arrived. */
async function fetchSources(
  context: Context,
  laid: readonly Laid[],
  stage: Name,
): Promise<ReadonlySet<Name>> {
  const files = new Map(
    laid.flatMap(({ type, source, size, mode }): [Name, Change][] =>
      type === "file" ? [[source, { name: source, what: "created", type, mode, size, modeOnly: false }]] : [],
    ),
  )
  const from = { directory: "/nix/store", what: "files of the result" }
  if (files.size > 0) await fetchContents(context, from, [...files.values()], `${stage}/in`)
  const arrived = new Set<Name>()
  takeIn({ stage: `${stage}/in`, bin: `${stage}/bin`, arrived }, "")
  return arrived
}

/** Makes the directory `out` of what arrived in `in`; a file that lies at several places is copied. */
function arrange(
  stage: Name,
  work: { laid: readonly Laid[]; arrived: ReadonlySet<Name>; host: string },
): void {
  const { laid, arrived, host } = work
  const uses = new Map<Name, number>()
  for (const { source } of laid) uses.set(source, (uses.get(source) ?? 0) + 1)
  const umask = currentUmask()
  fs.mkdirSync(buffer(`${stage}/out`), { mode: 0o777 })
  for (const { name, type, source, size, mode, target } of laid) {
    const to = `${stage}/out/${name}`
    if (type === "directory") fs.mkdirSync(buffer(to), { recursive: true, mode: 0o777 })
    if (type === "link") fs.symlinkSync(buffer(target), buffer(to))
    if (type !== "file") continue
    const from = `${stage}/in/${source}`
    const stat = arrived.has(source) ? lstat(from) : undefined
    if (!stat?.isFile() || Number(stat.size) !== size)
      throw new EdictError(`${host} did not send ${shown(text(source))} as it had named it`, "run it again")
    const left = uses.get(source)! - 1
    uses.set(source, left)
    if (left === 0) moveFile(from, to)
    else fs.copyFileSync(buffer(from), buffer(to), fs.constants.COPYFILE_EXCL | fs.constants.COPYFILE_FICLONE)
    fs.chmodSync(buffer(to), ((mode & 0o100) === 0 ? 0o666 : 0o777) & ~umask)
  }
}

// ── 13. Sync back: what the command changed comes home, never over an edit made here meanwhile ──────────
// Base is what was uploaded. Contents come as a tar stream into an empty private directory and are applied file by
// file: where base and local differ, local stays. Nothing below a .git is ever written, nor through a link.

const MASS_DELETE_SHARE = 0.5
const MASS_DELETE_LEAST = 20

/** Brings home the changes of every tree; conflicts are reported at the end, and the manifests are renewed. */
async function syncBack(context: Context, states: readonly TreeState[], outcome: Outcome): Promise<void> {
  for (const problem of outcome.unseen)
    throw new EdictError(
      `what the command changed is not known: ${shown(problem)}`,
      "run it again: the next run brings home what is over there",
    )
  const syncing = states.map((state) => syncTree(context, state, outcome))
  const trouble = await firstTrouble(context, syncing)
  if (trouble) throw trouble
}

/** Brings home the changes of one tree; from then on both sides agree on what is over there. */
async function syncTree(context: Context, state: TreeState, outcome: Outcome): Promise<void> {
  const { tree, manifest } = state
  const changes = outcome.changes.get(tree.id)
  if (changes === undefined) return
  const gitChanges = outcome.git.get(tree.id)
  let { token } = manifest
  const sent = (name: Name) => state.places?.some((place) => place.name === name) ?? true
  const isQuiet = tree.kind === "git" && changes.every((change) => isStoreLink(change) && !sent(change.name))
  if (!isQuiet) {
    const staged = (gitChanges?.index.length ?? 0) > 0
    token = randomName()
    await alone(context, tree, async () => {
      const home = await bringHome(context, state, { changes, deletions: "honour", staged })
      writeManifest(manifestFile(context, tree), { token, previous: manifest.token, ...home })
      if (gitChanges && tree.comesHome === "all") await bringCommitsHome(context, tree, gitChanges)
    })
  }
  context.session!.tell("agreed", tree.id, token)
}

/** Work on a local tree while no other run brings anything home to it: equal changes of two hosts are no conflict. */
async function alone<T>(context: Context, tree: Tree, work: () => Promise<T>): Promise<T> {
  const locks = await lockSoon(
    path.join(stateDirectory(context.env), "locks", `home-${hash(tree.local).slice(0, 24)}`),
  )
  try {
    return await work()
  } finally {
    for (const lock of locks) fs.closeSync(lock)
  }
}

/** What came home and what did not, at the end of a run. */
function tellChanges({ report, plan, steps }: Context): void {
  const { changed, refs, conflicts } = report
  const isLoud = plan.options.verbosity >= 0
  if (isLoud && !steps.settles) {
    if (refs.length > 0) steps.say(`git: ${refs.map(shown).join(", ")} moved here`)
    if (changed.length > 0) steps.say(changedHere(changed, 8))
  }
  for (const { file, kept, why, hint } of conflicts) {
    steps.say(`conflict: ${shown(file)} ${why}`)
    if (kept)
      steps.say(
        `  theirs is kept: git diff --no-index -- ${shellQuote(shown(file))} ${shellQuote(shown(kept))}`,
      )
    if (hint) steps.say(`  try: ${hint}`)
  }
  if (plan.next !== undefined) return // the same command once more, and only then is all done
  const closing = closingLine(report, { cwd: plan.cwd.local, seconds: performance.now() / 1000 })
  if (steps.settles && closing !== "") steps.say(closing)
}

/** "2 files changed here: a, b", with so many names at most. */
const changedHere = (changed: readonly string[], most: number): string =>
  `${fileCount(changed.length)} changed here: ${someOf(changed, most)}`

const fileCount = (count: number): string => `${count} file${count === 1 ? "" : "s"}`

const someOf = (names: readonly string[], most: number): string =>
  `${names.slice(0, most).map(shown).join(", ")}${names.length > most ? ", …" : ""}`

/** Seconds below which a run that brings nothing home ends without a line. */
const WORTH_A_LINE = 2

/**
 * What the steps on the terminal settle into: "result -> /nix/store/…-x; 2 files changed here: a, b; git: main moved
 * here (3.2 s)". "" for a short run that brought nothing home.
 */
export function closingLine(
  report: Pick<Report, "resultLinks" | "materialized" | "changed" | "refs">,
  how: { cwd: string; seconds: number },
): string {
  const { resultLinks, materialized, changed, refs } = report
  const [first] = resultLinks
  const names = resultLinks.map(({ link }) => path.relative(how.cwd, link))
  const out = materialized && nameHere(how.cwd, materialized.directory)
  const moved = refs.map((ref) => shown(ref.replace(/^refs\/(heads|tags)\//, "")))
  const home = [
    ...(resultLinks.length === 1 ? [`${nameHere(how.cwd, first!.link)} -> ${first!.target}`] : []),
    ...(resultLinks.length > 1 ? [`${resultLinks.length} result links: ${someOf(names, 3)}`] : []),
    ...(materialized ? [`${out} holds ${fileCount(materialized.files)}`] : []),
    ...(changed.length > 0 ? [changedHere(changed, 3)] : []),
    ...(refs.length > 0 ? [`git: ${moved.join(", ")} moved here`] : []),
  ]
  if (home.length === 0 && how.seconds < WORTH_A_LINE) return ""
  return `${home.length > 0 ? home.join("; ") : "nothing came home"} (${duration(how.seconds)})`
}

/** A time for people: "0.4 s", "42 s", "3 min 20 s", "2 h 5 min". */
export function duration(seconds: number): string {
  if (seconds < 9.95) return `${seconds.toFixed(1)} s`
  const whole = Math.round(seconds)
  if (whole < 60) return `${whole} s`
  if (whole < 3600) return `${Math.floor(whole / 60)} min ${whole % 60} s`
  return `${Math.floor(whole / 3600)} h ${Math.floor((whole % 3600) / 60)} min`
}

/** A tree's changes were found before the upload: an earlier run was cut off, or somebody worked over there. */
async function recover(
  context: Context,
  state: TreeState,
  opened: Opened,
): Promise<Pick<Manifest, "entries" | "pruned">> {
  const { tree } = state
  const interrupted = opened.state === "interrupted"
  if (interrupted)
    note(context, `an earlier run on ${context.plan.host.name} was cut off; first its changes come home`)
  const comesHome = interrupted ? "all" : opened.state === "discarded" ? "nothing" : tree.comesHome
  return await alone(context, tree, async () => {
    const home = await bringHome(
      context,
      { ...state, tree: { ...tree, comesHome } },
      { changes: opened.changes, deletions: interrupted ? "honour" : "ignore", staged: true, earlier: true },
    )
    if (interrupted) await bringCommitsHome(context, tree, opened.git)
    return home
  })
}

/** `staged`: whether what is staged differs over there; the index file itself changes with every look at it. */
type Homecoming = Readonly<{
  changes: readonly Change[]
  deletions: "honour" | "ignore"
  staged: boolean
  earlier?: true // the changes of an earlier run
}>

/** The manifest's entry for a path of which only its type is known. */
function unknownEntry({ type, mode }: Change): Entry {
  return { type: type === "other" ? "file" : type, mode: mode & 0o777, identity: "", hash: UNKNOWN }
}

/** Applies a tree's changes here; answers what the remote tree holds now, and which ignored directories to skip there. */
async function bringHome(
  context: Context,
  state: TreeState,
  coming: Homecoming,
): Promise<{ entries: Map<Name, Entry>; pruned: Name[] }> {
  const { tree, manifest } = state
  const entries = new Map(manifest.entries)
  const [inGit, files] = partition(coming.changes, ({ name }) => name.split("/").includes(".git"))
  // What the command did inside .git stays there; the next upload puts ours in its place again.
  for (const change of inGit) {
    if (change.what === "deleted") entries.delete(change.name)
    else if (change.name !== ".git/index" || coming.staged) entries.set(change.name, unknownEntry(change))
  }
  tellRepositories(context, state, inGit)
  const deletions = mayDelete(context, state, { ...coming, changes: files }) ? coming.deletions : "ignore"
  const wanted = files.filter((change) => isWanted(tree, change, { ...coming, deletions }))
  const guard = await guardOf(tree, wanted)
  const rules = wanted.filter(({ name }) => path.basename(name) === ".gitignore")
  const pruned = new Set(manifest.pruned)
  const failed: Applied[] = []
  // The ignore rules that the command leaves are the ones that decide on its other files.
  for (const group of [rules, wanted.filter((change) => !rules.includes(change))]) {
    const ignored = await ignoredNames(
      state,
      group.filter(({ name }) => !manifest.entries.has(name)),
    )
    for (const name of ignored.directories) pruned.add(name)
    const kept = withoutHollow(
      group.filter(({ name }) => !ignored.names.has(name)),
      files,
    )
    for (const applied of await applyChanges(context, state, { changes: kept, guard })) {
      record(context, tree, entries, applied)
      if (applied.verdict === "failed") failed.push(applied)
    }
  }
  await rescue(context, state, entries)
  const arriving = new Set(wanted.map(({ name }) => name))
  const left = files.filter(({ name }) => !arriving.has(name))
  const ignored = await ignoredNames(
    state,
    left.filter(({ name }) => !entries.has(name)),
  )
  for (const change of left) {
    const { name, what } = change
    // What stays over there without being wanted is put right by the next upload; ignored files are its own.
    if (what === "deleted") entries.delete(name)
    else if (!ignored.names.has(name) && !(tree.kind === "git" && isStoreLink(change)))
      entries.set(name, unknownEntry(change))
  }
  if (failed[0])
    throw new EdictError(
      `${failed.length} change${failed.length === 1 ? "" : "s"} could not be brought home, everything else is: ${failed.map(({ name, why }) => `${shown(text(name))} ${why}`).join("; ")}`,
      "mend that and run again: the next run brings home what is left",
    )
  return { entries, pruned: [...pruned] }
}

/** Repositories that came into being over there: their files come home, their .git does not. */
function tellRepositories(context: Context, state: TreeState, inGit: readonly Change[]): void {
  const known = new Set([...state.manifest.entries.keys()].flatMap(gitDirectoryOf))
  const made = inGit.filter(({ what }) => what === "created").flatMap(({ name }) => gitDirectoryOf(name))
  for (const name of new Set(made))
    if (!known.has(name)) note(context, `${shown(text(name))} was made over there, and stays there`)
}

/** The topmost .git in a name. */
const gitDirectoryOf = (name: Name): Name[] => {
  const parts = name.split("/")
  return parts.includes(".git") ? [parts.slice(0, parts.indexOf(".git") + 1).join("/")] : []
}

/** Without directories whose content all stays over there; one that is empty there comes home. */
function withoutHollow(kept: readonly Change[], all: readonly Change[]): Change[] {
  const parents = (changes: readonly Change[]) =>
    new Set(
      changes
        .filter(({ what, type }) => what !== "deleted" && type !== "directory")
        .flatMap(({ name }) => parentsOf(name)),
    )
  const [filled, full] = [parents(kept), parents(all)]
  return kept.flatMap((change): Change[] => {
    const { name, what, type } = change
    if (what === "deleted" || type !== "directory" || filled.has(name) || !full.has(name)) return [change]
    return what === "created" ? [] : [{ ...change, what: "deleted", type: "file" }]
  })
}

/** Whether a change is of the kind that comes home for this tree. */
function isWanted(tree: Tree, change: Change, coming: Homecoming): boolean {
  if (change.what === "deleted" && coming.deletions === "ignore") return false
  if (isStoreLink(change) || isOwn(change.name)) return false
  if (tree.comesHome === "all") return true
  return (
    tree.comesHome === "lock-file" && path.basename(change.name) === "flake.lock" && change.what !== "deleted"
  )
}

/** Takes one verdict into the manifest and the report. */
function record(context: Context, tree: Tree, entries: Map<Name, Entry>, applied: Applied): void {
  const { report } = context
  if (applied.entry) entries.set(applied.name, applied.entry)
  else entries.delete(applied.name)
  const file = shownPath(context, tree, applied.name)
  if (applied.verdict === "applied" && applied.counts) report.changed.push(file)
  if (applied.verdict === "conflict" || applied.verdict === "refused") {
    const kept = applied.kept === undefined ? undefined : path.relative(context.plan.cwd.local, applied.kept)
    report.conflicts.push({ file, kept, why: applied.why ?? "" })
  }
}

const shownPath = (context: Context, tree: Tree, name: Name): string =>
  path.relative(context.plan.cwd.local, path.join(rootHere(tree), text(name)))

/**
 * Which of these new names git ignores here, and the topmost ignored directories among their parents that hold
 * nothing that travels. Asked repository by repository, as git refuses names inside a submodule; without the
 * index, in which it would look for a name with wildcards as for a pattern.
 */
async function ignoredNames(
  { tree, manifest }: TreeState,
  changes: readonly Pick<Change, "name" | "type">[],
): Promise<{ names: Set<Name>; directories: Name[] }> {
  const ignored = new Set<Name>()
  // One name that git cannot look up would end its answer.
  const known = changes.filter(
    ({ name }) => unsafeName(name) === undefined && !parentProblem(bytes(tree.local), name),
  )
  if (tree.kind !== "git" || known.length === 0) return { names: ignored, directories: [] }
  const asked = [
    ...new Set(
      known.flatMap(({ name, type }) => [
        type === "directory" ? `${name}/` : name,
        ...parentsOf(name).map((parent) => `${parent}/`),
      ]),
    ),
  ]
  const groups = Map.groupBy(asked, (name) => repositoryOf(tree, name))
  for (const [repository, members] of groups) {
    const inner = (name: Name) => (repository === "" ? name : name.slice(repository.length + 1))
    const input = Buffer.from(
      members
        .filter((name) => inner(name) !== "" && inner(name) !== "/")
        .map((name) => `./${inner(name)}\0`) // a name with a colon in front would be a pattern
        .join(""),
      "latin1",
    )
    if (input.length === 0) continue
    const directory = text(`${bytes(tree.local)}${repository === "" ? "" : `/${repository}`}`)
    const answer = await capture(
      git(directory, "check-ignore", "--no-index", "-z", "--stdin"),
      "may-fail",
      input,
    )
    for (const name of answer.split("\0").map((dotted) => dotted.slice(2)))
      if (name !== "") ignored.add(repository === "" ? name : `${repository}/${name}`)
  }
  const isIgnored = ({ name, type }: Pick<Change, "name" | "type">) =>
    ignored.has(type === "directory" ? `${name}/` : name) ||
    parentsOf(name).some((parent) => ignored.has(`${parent}/`))
  const names = new Set(known.filter(isIgnored).map(({ name }) => name))
  const directories = [...ignored].filter((name) => name.endsWith("/")).map((name) => name.slice(0, -1))
  if (directories.length === 0) return { names, directories }
  const holding = new Set([...manifest.entries.keys()].flatMap((name) => [name, ...parentsOf(name)]))
  const whole = new Set(directories.filter((name) => !holding.has(name)))
  return { names, directories: [...whole].filter((name) => !parentsOf(name).some((up) => whole.has(up))) }
}

/** The nested repository or submodule that a name lies in; "" for the tree itself. */
function repositoryOf(tree: Tree, name: Name): Name {
  return (
    parentsOf(name.replace(/\/$/, "")).findLast(
      (parent) => lstat(`${bytes(tree.local)}/${parent}/.git`) !== undefined,
    ) ?? ""
  )
}

/** Why changes must not be applied: `refused` are not even fetched, `held` come into the conflict directory. */
type Guard = Readonly<{ refused: ReadonlyMap<Name, string>; held: ReadonlyMap<Name, string> }>

/** Looks for what could make git or anything else here run what the other side sent. */
async function guardOf(tree: Tree, changes: readonly Change[]): Promise<Guard> {
  const refused = new Map<Name, string>()
  const held = new Map<Name, string>()
  const root = bytes(rootHere(tree))
  const bare = bareRepositories(root, changes)
  const obeyed = await obeyedByGit(tree, changes)
  for (const { name, what, type } of changes) {
    const unsafe = unsafeName(name)
    const inBare = bare.find((directory) => isRepositoryPart(directory, name))
    const lower = name.toLowerCase()
    const place = obeyed.find(
      (obeying) => isWithin(lower, obeying.name) || (type !== "directory" && isWithin(obeying.name, lower)),
    )
    if (unsafe) refused.set(name, unsafe)
    else if (type === "other" && what !== "deleted") refused.set(name, "is no file, directory or link")
    else if (inBare !== undefined && what !== "deleted")
      refused.set(name, `would be part of a git repository in ${shown(text(inBare)) || "."}`)
    else if (place) held.set(name, `is run or obeyed by git here (${place.key}); yours stays`)
  }
  return { refused, held }
}

const REPOSITORY_PARTS =
  /^(head|objects|refs|commondir|config|config\.worktree|hooks|info|packed-refs|modules|worktrees)$/i

/** Whether a name is one of the parts of a git repository in `directory`. */
const isRepositoryPart = (directory: Name, name: Name): boolean =>
  (directory === "" || name.startsWith(`${directory}/`)) &&
  REPOSITORY_PARTS.test(name.slice(directory === "" ? 0 : directory.length + 1).split("/")[0]!)

/** Directories that git would take for a repository, and obey its config, if these changes were applied. */
function bareRepositories(root: string, changes: readonly Change[]): Name[] {
  const parts = new Map<Name, Set<string>>()
  for (const { name, what } of changes)
    for (const [at, part] of what === "deleted" ? [] : name.split("/").entries())
      if (REPOSITORY_PARTS.test(part)) {
        const directory = name.split("/").slice(0, at).join("/")
        parts.set(directory, (parts.get(directory) ?? new Set()).add(part.toLowerCase()))
      }
  return [...parts].flatMap(([directory, coming]) => {
    const has = (part: string) =>
      coming.has(part.toLowerCase()) ||
      lstat(`${root}/${directory === "" ? "" : `${directory}/`}${part}`) !== undefined
    return has("HEAD") && ((has("objects") && has("refs")) || has("commondir")) ? [directory] : []
  })
}

/** Places in the tree that the git config here tells git to run or to include, in lower case. */
async function obeyedByGit(tree: Tree, changes: readonly Change[]): Promise<{ name: Name; key: string }[]> {
  if (changes.length === 0 || gitRootOf(rootHere(tree)) === undefined) return []
  const root = rootHere(tree)
  const nested = new Set(changes.map(({ name }) => repositoryOf(tree, name)).filter((name) => name !== ""))
  const tops = [gitRootOf(root)!, ...[...nested].map((name) => path.join(root, text(name)))]
  const keys = "^(core\\.(hookspath|fsmonitor)|include\\.path|includeif\\..*\\.path)$"
  const found = tops.map(async (top) => {
    const words = git(top, "config", "--null", "--show-origin", "--get-regexp", keys)
    const answer = text(await capture(words, "may-fail")).split("\0")
    return answer.flatMap((setting, at) => {
      const origin = answer[at - 1]
      if (at % 2 === 0 || !origin?.startsWith("file:")) return []
      const [key, value] = [setting.split("\n")[0]!, setting.slice(setting.indexOf("\n") + 1)]
      const from = key.startsWith("include") ? path.dirname(path.resolve(top, origin.slice(5))) : top
      const place = path.resolve(from, value.replace(/^~(?=\/)/, os.homedir()))
      const real = fs.existsSync(place) ? fs.realpathSync(place) : place
      return [place, real]
        .filter((file) => file !== root && isWithin(file, root))
        .map((file) => ({ name: bytes(path.relative(root, file)).toLowerCase(), key }))
    })
  })
  return (await Promise.all(found)).flat()
}

/** Result links that must not be made here, with the reason: the other side names them. */
async function refusedLinks(plan: Plan, links: readonly ResultLink[]): Promise<Map<string, string>> {
  const refused = new Map<string, string>()
  for (const tree of plan.trees.filter(({ comesHome }) => comesHome !== "nothing")) {
    const root = rootHere(tree)
    const inside = links.filter(({ link }) => isWithin(link, root))
    const changes = inside.map(({ link }): Change => {
      const name = bytes(path.relative(root, link))
      return { name, what: "created", type: "link", mode: 0o777, size: 0, modeOnly: false }
    })
    const guard = await guardOf(tree, changes)
    for (const [at, { name }] of changes.entries()) {
      const why = guard.refused.get(name) ?? guard.held.get(name) ?? parentProblem(bytes(root), name)
      if (why) refused.set(inside[at]!.link, why)
    }
  }
  return refused
}

/** Fetches what was created or changed and applies each change; the order leaves no moment without a renamed file. */
async function applyChanges(
  context: Context,
  state: TreeState,
  coming: { changes: readonly Change[]; guard: Guard },
): Promise<Applied[]> {
  const { changes, guard } = coming
  if (changes.length === 0) return []
  const { tree, manifest } = state
  const places = await workPlaces(tree, context.run)
  const work: Work = {
    root: bytes(rootHere(tree)),
    stage: `${places.stage}/apply`,
    bin: `${places.stage}/out`,
    conflicts: places.conflicts,
    base: manifest.entries,
    guard: { held: guard.held, refused: new Map(guard.refused) },
    arrived: new Set(),
    directories: tree.kind !== "git",
    inner: new Set(changes.flatMap(({ name }) => parentsOf(name))),
    swapped: new Map(),
    temporary: [],
  }
  removeAll(places.stage)
  try {
    fs.mkdirSync(buffer(`${places.stage}/in`), { recursive: true, mode: 0o700 })
    if (isCaseInsensitive(places.stage)) refuseCollisions(work, changes)
    const fetched = changes.filter(
      ({ what, type, name }) => what !== "deleted" && type !== "directory" && !work.guard.refused.has(name),
    )
    const what = `changes of ${shown(tree.local)}`
    const from = { directory: remoteRootOf(tree)[0], what, onCtrlC: "goes on" } as const
    if (fetched.length > 0) await fetchContents(context, from, fetched, `${places.stage}/in`)
    // From here on the directory may hold the only copy of something: see rescue.
    fs.renameSync(buffer(`${places.stage}/in`), buffer(work.stage))
    takeIn(work, "")
    const results = inOrder(changes).map((change) => applyChange(work, change))
    return results.map((applied) => recheck(work, applied))
  } catch (error) {
    throw asEdictError(error, `changes of ${shown(tree.local)} cannot be brought home`)
  } finally {
    for (const file of [...work.temporary, places.stage]) removeAll(file)
    removeIfEmpty(path.posix.dirname(places.stage))
  }
}

const asEdictError = (error: unknown, what: string): unknown =>
  error instanceof Error && "code" in error ? new EdictError(`${what}: ${reason(error)}`) : error

/** What really arrived: walked without following a link, each file on its own and readable. */
function takeIn(work: Pick<Work, "stage" | "bin" | "arrived">, prefix: Name): void {
  const directory = prefix === "" ? work.stage : `${work.stage}/${prefix.slice(0, -1)}`
  fs.chmodSync(buffer(directory), 0o700)
  for (const item of fs.readdirSync(buffer(directory), { encoding: "buffer" })) {
    const name = prefix + item.toString("latin1")
    const file = `${work.stage}/${name}`
    const stat = lstat(file)!
    if (stat.isDirectory()) takeIn(work, `${name}/`)
    else work.arrived.add(name)
    if (!stat.isFile()) continue
    if (stat.nlink > 1n) {
      const copy = `${work.bin}-${randomName()}`
      fs.copyFileSync(buffer(file), buffer(copy))
      moveFile(copy, file)
    }
    fs.chmodSync(buffer(file), 0o600)
  }
}

/** Whether two names that differ in case are one file in `directory`. */
function isCaseInsensitive(directory: string): boolean {
  fs.writeFileSync(buffer(`${directory}/case`), "")
  return lstat(`${directory}/CASE`) !== undefined
}

/** Of names that are one file here, only the first is written. */
function refuseCollisions(work: Work, changes: readonly Change[]): void {
  const names = changes.filter(({ what }) => what !== "deleted").map(({ name }) => name)
  for (const [name, other] of collisions(names))
    work.guard.refused.set(name, `is the same file as ${shown(text(other))} on this file system`)
}

/** Names that a file system without case, or without difference of composed letters, takes for an earlier one. */
export function collisions(names: readonly Name[]): Map<Name, Name> {
  const first = new Map<string, Name>()
  const result = new Map<Name, Name>()
  for (const name of [...names].sort()) {
    const folded = text(name).normalize("NFC").toLowerCase()
    const other = first.get(folded)
    if (other === undefined) first.set(folded, name)
    else result.set(name, other)
  }
  return result
}

/**
 * What a run that was killed while it applied changes left behind. Such a directory may hold the only copy of a
 * save made here in that moment: what is neither known nor lies in its place goes to the conflicts.
 */
async function rescue(context: Context, state: TreeState, entries: ReadonlyMap<Name, Entry>): Promise<void> {
  const { tree, manifest } = state
  const { stage, conflicts } = await workPlaces(tree, context.run)
  const parent = path.posix.dirname(stage)
  if (!lstat(parent)?.isDirectory()) return
  const root = bytes(rootHere(tree))
  for (const left of fs.readdirSync(buffer(parent), { encoding: "latin1" })) {
    const owner = /^(.*)\.(\d+)\.[0-9a-f]+$/s.exec(left)
    if (owner?.[1] !== bytes(os.hostname()) || isAlive(Number(owner[2]))) continue
    for (const part of ["apply", "out"]) {
      const from = `${parent}/${left}/${part}`
      for (const { inner: name } of lstat(from)?.isDirectory() ? listDirectory(from, "") : []) {
        const found = stateOf(`${from}/${name}`)
        const known = [manifest.entries.get(name), entries.get(name), stateOf(`${root}/${name}`)]
        if (!found || found.type === "directory" || known.some((one) => one?.hash === found.hash)) continue
        const kept = keep({ conflicts }, name, `${from}/${name}`)
        context.report.conflicts.push({
          file: shownPath(context, tree, name),
          kept: path.relative(context.plan.cwd.local, kept),
          why: "was being replaced when an earlier run was killed; one of its versions is kept",
        })
      }
    }
    removeAll(`${parent}/${left}`)
  }
  removeIfEmpty(parent)
}

function isAlive(pid: number): boolean {
  try {
    return process.kill(pid, 0)
  } catch (error) {
    return (error as NodeJS.ErrnoException).code === "EPERM"
  }
}

/** Removes a directory of our own with all that is in it; what cannot be removed is left to the next run. */
function removeAll(directory: string): void {
  try {
    fs.rmSync(buffer(directory), { recursive: true, force: true })
  } catch {
    // a directory without permissions in it, most likely: nothing here depends on it
  }
}

const rootHere = (tree: Tree): string =>
  tree.kind === "file" || tree.kind === "output" ? path.dirname(tree.local) : tree.local

/** Deletions that clear the way for something of another type, directories, files, and then all other deletions. */
function inOrder(changes: readonly Change[]): Change[] {
  const arriving = new Set(
    changes.filter(({ what, type }) => what !== "deleted" && type !== "directory").map(({ name }) => name),
  )
  const rank = (change: Change) => {
    if (change.what === "deleted" && parentsOf(change.name).some((parent) => arriving.has(parent))) return 0
    if (change.what === "deleted") return change.type === "directory" ? 4 : 3
    return change.type === "directory" ? 1 : 2
  }
  const deepestFirst = (a: Change, b: Change) => b.name.length - a.name.length
  return [...changes].sort(
    (a, b) => rank(a) - rank(b) || (a.what === "deleted" ? deepestFirst(a, b) : -deepestFirst(a, b)),
  )
}

/**
 * Whether the deletions among the changes are done here, too. More than anybody wants by accident is asked for, or
 * allowed by an option, or stops everything. What stopped an earlier run is left out by the next one.
 */
function mayDelete(context: Context, { tree, manifest }: TreeState, coming: Homecoming): boolean {
  const { plan } = context
  const files = [...manifest.entries].filter(
    ([name, { type }]) => type !== "directory" && !hasGitComponent(name),
  ).length
  const deleted = coming.changes.filter(
    ({ name, what, type }) => what === "deleted" && type !== "directory" && manifest.entries.has(name),
  ).length
  const few = deleted <= MASS_DELETE_LEAST || deleted <= files * MASS_DELETE_SHARE
  if (few || coming.deletions === "ignore" || plan.options.allowMassDelete) return true
  const share = `${deleted} of ${files} files in ${shown(tree.local)}`
  if (coming.earlier) {
    note(context, `an earlier command deleted ${share} over there; they stay here and go over again`)
    return false
  }
  const release = context.steps.hold("always")
  const isAllowed = askUser(`the command deleted ${share} over there. Delete them here, too? [y/N] `)
  release()
  if (isAllowed) return true
  throw new EdictError(
    `the command deleted ${share} over there; nothing of it was applied here`,
    "to delete them here, too: run it again with --allow-mass-delete; to bring them back there: run it again without",
  )
}

/** Asks on the terminal; no without one. */
function askUser(question: string): boolean {
  if (![0, 2].every((descriptor) => isTerminal(descriptor))) return false
  process.stderr.write(`edict: ${question}`)
  // A program of its own, which Ctrl-C ends; and that is a no.
  const answer = Bun.spawnSync(["head", "-n", "1"], { stdin: "inherit", stderr: "ignore" })
  return /^y(es)?\s*$/i.test(answer.stdout.toString())
}

/** Private directories on the tree's file system: for what arrives, and for the remote side of conflicts. */
async function workPlaces(tree: Tree, run: string): Promise<{ stage: string; conflicts: string }> {
  const mine = `${bytes(os.hostname())}.${process.pid}.${run}`
  if (tree.kind !== "git") {
    const root = bytes(rootHere(tree))
    return { stage: `${root}/.edict-stage/${mine}`, conflicts: `${root}/.edict-conflicts/${run}` }
  }
  const directory = (await capture(git(tree.local, "rev-parse", "--absolute-git-dir"))).replace(/\n$/, "")
  return { stage: `${directory}/edict/stage/${mine}`, conflicts: `${directory}/edict/conflicts/${run}` }
}

/** Brings the contents of changed files into `stage`: one ssh, one tar, no byte through this program. */
async function fetchContents(
  context: Context,
  from: { directory: string; what: string } & Pick<Execution, "onCtrlC">,
  changes: readonly Change[],
  stage: string,
): Promise<void> {
  const { directory, what } = from
  const names = changes.map(({ name }) => `./${name}\0`).join("")
  const input = `${encodeScript(FETCH_SCRIPT)}\n${directory}\n${encodeWord(names, "latin1")}\n`
  const limit = fetchLimit(changes)
  const { bavail, bsize } = fs.statfsSync(buffer(stage))
  if (limit.announced > bavail * bsize)
    throw new EdictError(
      `the ${what} are ${Math.ceil(limit.announced / 2 ** 20)} MiB; there is no space left for them here`,
      "free some space here; the next run brings them home",
    )
  const unpack = ["tar", "-xmof", "-", "-C", text(stage)]
  const stages = [[...sshArguments(context), BOOT_LINE], ["head", "-c", String(limit.bytes)], unpack]
  await execute(context, pipeline(...stages), {
    input: Buffer.from(input, "latin1"),
    what: `retrieval of ${what}`,
    onCtrlC: from.onCtrlC,
    failure: (_, errors) =>
      /Unexpected EOF|truncated|short read/i.test(errors)
        ? new EdictError(
            `the ${what} were cut off, or more than ${context.plan.host.name} had announced; nothing of them was applied here`,
            "run again: the next run brings them home",
          )
        : undefined,
  })
  context.report.bytesDown += limit.announced
}

/** How much the other side announced, and how much it may send: tar's headers, padding and long names on top. */
function fetchLimit(changes: readonly Change[]): { announced: number; bytes: number } {
  const announced = changes.reduce((sum, { size }) => sum + size, 0)
  const headers = changes.reduce(
    (sum, { name, target }) => sum + 4096 + 4 * name.length + 4 * (target ?? "").length,
    0,
  )
  return { announced, bytes: Math.ceil(announced * 1.25) + headers + 2 ** 24 }
}

/**
 * Why a name from the other side must not be written here, or undefined. Components that a file system may take
 * for .git: by case, by the short name git~1, by code points that HFS+ ignores, by trailing dots and spaces.
 */
export function unsafeName(name: Name): string | undefined {
  const parts = name.split("/")
  if (name === "" || parts.some((part) => part === "" || part === "." || part === ".."))
    return "is no path inside the tree"
  if (name.includes("\0")) return "holds a NUL"
  if (hasGitComponent(name)) return "lies in a .git"
  return undefined
}

function hasGitComponent(name: Name): boolean {
  // The UTF-8 bytes of U+200C–F, U+202A–E, U+206A–F and U+FEFF, which HFS+ ignores in names.
  const ignorable = /\xe2\x80[\x8c-\x8f\xaa-\xae]|\xe2\x81[\xaa-\xaf]|\xef\xbb\xbf/g
  return name.split("/").some((part) =>
    /^(\.git|git~\d+)$/i.test(
      part
        .replace(ignorable, "")
        .replace(/[. ]+$/, "")
        .replace(/:.*$/, ""),
    ),
  )
}

type Work = {
  readonly root: string
  readonly stage: string
  readonly bin: string // what was deleted here, until the end
  readonly conflicts: string
  readonly base: ReadonlyMap<Name, Entry>
  readonly guard: { readonly held: ReadonlyMap<Name, string>; readonly refused: Map<Name, string> }
  readonly arrived: Set<Name>
  readonly directories: boolean // whether directories belong to the tree: they do outside git
  readonly inner: ReadonlySet<Name> // directories with a change below them
  readonly swapped: Map<Name, Swapped>
  readonly temporary: string[]
}
type Swapped = Readonly<{ old: string; identity: string }>

/** One change. What fails here fails for this path alone, and the other side's version is kept if it can be. */
function applyChange(work: Work, change: Change): Applied {
  const { name } = change
  try {
    return mergeChange(work, change)
  } catch (error) {
    const why = `could not be written here: ${reason(error).replace(/, \w+ '.*$/s, "")}`
    try {
      const theirs =
        change.what === "deleted" || change.type === "directory" ? undefined : arrived(work, change)
      if (theirs) return conflict(work, change, theirs, why)
    } catch {
      // it cannot be kept either: it stays over there, and the next run tries again
    }
    return { name, verdict: "failed", why }
  }
}

/** One change, three-way. Everything up to the verdict happens at once: nothing else of this program runs between. */
function mergeChange(work: Work, change: Change): Applied {
  const { name } = change
  const refuse = work.guard.refused.get(name)
  if (refuse) return { name, verdict: "refused", why: refuse }
  const blocked = parentProblem(work.root, name)
  if (change.what === "deleted") return blocked ? { name, verdict: "same" } : applyDeletion(work, change)
  const theirs: Entry | undefined =
    change.type === "directory"
      ? { type: "directory", mode: change.mode & 0o777, identity: "", hash: "" }
      : arrived(work, change)
  if (!theirs) return { name, verdict: "refused", why: "did not arrive as what it was named" }
  if (blocked && change.type === "directory")
    return { name, verdict: "same", entry: work.directories ? theirs : undefined }
  if (blocked) return conflict(work, change, theirs, blocked)
  if (change.type === "directory") return applyDirectory(work, change, theirs)
  const target = `${work.root}/${name}`
  const local = stateOf(target)
  const base = work.base.get(name)
  const held = work.guard.held.get(name)
  const isLike = (other: { type: string; hash: string } | undefined) =>
    other !== undefined && other.type === theirs.type && other.hash === theirs.hash
  if (isLike(base) && local?.type !== theirs.type) return { name, verdict: "same", entry: theirs }
  if (isLike(base) || isLike(local)) return settleMode(work, change, theirs, base)
  if (held) return conflict(work, change, theirs, held)
  if (!local && lstat(target)) return conflict(work, change, theirs, "is no file, directory or link here")
  if (!local && base) return conflict(work, change, theirs, "was deleted here and changed there")
  if (local?.type === "directory") {
    if (!base || base.type === "directory") removeIfEmpty(target)
    if (lstat(target)) return conflict(work, change, theirs, "is a directory here")
    return createFile(work, change, theirs)
  }
  if (!local) return createFile(work, change, theirs)
  if (!base || base.hash !== local.hash || base.type !== local.type)
    return conflict(work, change, theirs, base ? "was changed here and there" : "was made here and there")
  return replaceLocal(work, change, theirs, local)
}

/** The staged version of a change, if it arrived as what it was announced. */
function arrived(work: Work, change: Change): Entry | undefined {
  const staged = work.arrived.has(change.name) ? stateOf(`${work.stage}/${change.name}`) : undefined
  return staged?.type === change.type
    ? { type: staged.type, mode: change.mode & 0o777, identity: "", hash: staged.hash }
    : undefined
}

/** Why the directories above a name cannot be walked: each must be a real directory, or not there yet. */
function parentProblem(root: string, name: Name): string | undefined {
  for (const parent of parentsOf(name)) {
    const stat = lstat(`${root}/${parent}`)
    if (!stat) return undefined
    if (!stat.isDirectory()) return `cannot be placed: ${shown(text(parent))} is no directory here`
  }
  return undefined
}

/** Ours stays; theirs, if it has a content, goes to the conflict directory. */
function conflict(work: Work, change: Change, theirs: Entry, why: string): Applied {
  const { name } = change
  if (theirs.type === "directory")
    return { name, verdict: "conflict", why, entry: work.directories ? theirs : undefined }
  const mode = withExecutable(0o666 & ~currentUmask(), work.guard.held.has(name) ? 0 : theirs.mode)
  if (theirs.type === "file") fs.chmodSync(buffer(`${work.stage}/${name}`), mode)
  return { name, verdict: "conflict", why, kept: keep(work, name, `${work.stage}/${name}`), entry: theirs }
}

/** Moves a file into the conflict directory; answers its path. */
function keep(work: Pick<Work, "conflicts">, name: Name, from: string): string {
  // What was kept before may be a file where this name has a directory.
  const place = parentProblem(work.conflicts, name)
    ? `${work.conflicts}-${randomName().slice(0, 8)}`
    : work.conflicts
  const wanted = `${place}/${name}`
  const kept = lstat(wanted) ? `${wanted}.${randomName().slice(0, 8)}` : wanted
  fs.mkdirSync(buffer(path.posix.dirname(kept)), { recursive: true, mode: 0o700 })
  if (deviceOf(from) === deviceOf(path.posix.dirname(kept))) moveFile(from, kept)
  else copyBeside(from, kept)
  return text(kept)
}

/** What lies here now is what both sides agree on; of the mode just the executable bit, the other side has its umask. */
function agreed(work: Work, name: Name, theirs: Entry, counts: Applied["counts"]): Applied {
  const stat = lstat(`${work.root}/${name}`)
  const own = stat ? Number(stat.mode & 0o777n) : theirs.mode
  const mode = (own & 0o100) === (theirs.mode & 0o100) ? own : withExecutable(own, theirs.mode)
  return { name, verdict: counts ? "applied" : "same", counts, entry: { ...theirs, mode, identity: "" } }
}

/**
 * The content is settled: theirs is ours, or what was sent. The executable bit follows a side that changed it; all
 * bits do if the command did just a chmod.
 */
function settleMode(work: Work, change: Change, theirs: Entry, base: Entry | undefined): Applied {
  const target = `${work.root}/${change.name}`
  const stat = lstat(target)!
  const mode = Number(stat.mode & 0o777n)
  if (theirs.type !== "file" || base?.mode === theirs.mode)
    return agreed(work, change.name, theirs, undefined)
  const wanted = change.modeOnly ? theirs.mode : withExecutable(mode, theirs.mode)
  if (wanted === mode) return agreed(work, change.name, theirs, undefined)
  if (base && mode !== base.mode) return conflict(work, change, theirs, "had its mode changed here and there")
  const held = work.guard.held.get(change.name)
  if (held) return conflict(work, change, theirs, held)
  fs.chmodSync(buffer(target), wanted)
  return agreed(work, change.name, theirs, "counts")
}

/** `mode` with execute bits where it can be read, if `theirs` has one; without them otherwise. */
export const withExecutable = (mode: number, theirs: number): number =>
  (theirs & 0o100) === 0 ? mode & ~0o111 : mode | ((mode & 0o444) >> 2)

/** A new file: linked into its place, which fails if something is there by now. */
function createFile(work: Work, change: Change, theirs: Entry): Applied {
  const { name } = change
  const staged = `${work.stage}/${name}`
  if (theirs.type === "file")
    fs.chmodSync(buffer(staged), withExecutable(0o666 & ~currentUmask(), theirs.mode))
  fs.mkdirSync(buffer(path.posix.dirname(`${work.root}/${name}`)), { recursive: true })
  try {
    linkOrCopy(staged, `${work.root}/${name}`)
  } catch (error) {
    if ((error as NodeJS.ErrnoException).code !== "EEXIST") throw error
    return conflict(work, change, theirs, "was made here and there")
  }
  return agreed(work, name, theirs, "counts")
}

/**
 * A file that only the command changed. Exchanged with the staged one in one step, and what came out is looked at
 * again: an editor's save between look and rename would otherwise be lost.
 */
function replaceLocal(work: Work, change: Change, theirs: Entry, local: LocalState): Applied {
  const { name } = change
  const target = `${work.root}/${name}`
  const base = work.base.get(name)
  const fresh = onDeviceOf(work, target, `${work.stage}/${name}`)
  const own = local.type === "file" ? local.mode : 0o666 & ~currentUmask()
  const keepsBits = base?.type === "file" && (base.mode & 0o100) === (theirs.mode & 0o100)
  if (theirs.type === "file") fs.chmodSync(buffer(fresh), keepsBits ? own : withExecutable(own, theirs.mode))
  if (!exchange(fresh, target)) return replaceByMoves(work, change, theirs, { local, fresh })
  const identity = contentIdentity(fresh)
  const out = stateOf(fresh)
  if (out?.hash === local.hash && out.type === local.type) {
    work.swapped.set(name, { old: fresh, identity })
    return agreed(work, name, theirs, "counts")
  }
  // It was changed here in between: back with it. A still newer save, if there is one, comes out here, too.
  if (!exchange(fresh, target)) linkOrCopy(fresh, target)
  if (stateOf(fresh)?.hash !== theirs.hash) return keptOurs(work, name, fresh)
  return conflict(work, change, theirs, "was changed here and there")
}

/** The same on a file system that cannot exchange: moved out, looked at, and the new one linked into the gap. */
function replaceByMoves(
  work: Work,
  change: Change,
  theirs: Entry,
  files: { local: LocalState; fresh: string },
): Applied {
  const { name } = change
  const target = `${work.root}/${name}`
  const old = binFor(work, name)
  const why = "was changed here and there"
  try {
    moveFile(target, old)
  } catch (error) {
    if ((error as NodeJS.ErrnoException).code !== "ENOENT") throw error
    return conflict(work, change, theirs, "was deleted here and changed there")
  }
  const identity = contentIdentity(old)
  const out = stateOf(old)
  if (out?.hash !== files.local.hash || out.type !== files.local.type)
    return putBack(old, target) ? conflict(work, change, theirs, why) : keptOurs(work, name, old)
  try {
    linkOrCopy(files.fresh, target)
  } catch (error) {
    if ((error as NodeJS.ErrnoException).code === "EEXIST") return conflict(work, change, theirs, why)
    putBack(old, target)
    throw error
  }
  work.swapped.set(name, { old, identity })
  return agreed(work, name, theirs, "counts")
}

/** Puts what was moved out into its place again; false if something else is there by now. */
function putBack(file: string, target: string): boolean {
  try {
    linkOrCopy(file, target)
    return true
  } catch (error) {
    if ((error as NodeJS.ErrnoException).code !== "EEXIST") throw error
    return false
  }
}

/** A version of ours that a still newer one of ours has replaced: kept all the same. */
const keptOurs = (work: Work, name: Name, file: string): Applied => ({
  name,
  verdict: "conflict",
  why: "was written here again and again while it was replaced; one of your versions is kept",
  kept: keep(work, name, file),
})

/** A deletion: moved out of the tree, looked at, and put back if it is not what the command deleted. */
function applyDeletion(work: Work, change: Change): Applied {
  const { name } = change
  const target = `${work.root}/${name}`
  const stat = lstat(target)
  if (!stat) return { name, verdict: "same" }
  if (stat.isDirectory()) {
    if (change.type === "directory") removeIfEmpty(target)
    return { name, verdict: "same" }
  }
  const base = work.base.get(name)
  if (!base || change.type === "directory") return { name, verdict: "same" }
  const stays = (why: string): Applied => ({ name, verdict: "conflict", why })
  const edited = "was changed here and deleted there; it stays"
  const before = stateOf(target)
  if (before?.hash !== base.hash || before.type !== base.type) return stays(edited)
  if (before.type === "file" && before.mode !== base.mode) return stays(edited)
  const held = work.guard.held.get(name)
  if (held) return stays(held)
  const old = binFor(work, name)
  moveFile(target, old)
  const identity = contentIdentity(old)
  if (stateOf(old)?.hash !== base.hash)
    return putBack(old, target) ? stays(edited) : keptOurs(work, name, old)
  work.swapped.set(name, { old, identity })
  return { name, verdict: "applied", counts: "counts" }
}

function applyDirectory(work: Work, change: Change, theirs: Entry): Applied {
  const { name } = change
  const target = `${work.root}/${name}`
  const entry = work.directories ? theirs : undefined
  const stat = lstat(target)
  if (stat?.isDirectory()) return { name, verdict: "same", entry }
  if (stat) {
    const before = work.base.get(name)
    const removed = before && applyDeletion(work, { ...change, what: "deleted", type: before.type })
    const why = removed?.why ?? "is a directory there and something else here"
    if (lstat(target))
      return work.inner.has(name) ? { name, verdict: "same", entry } : conflict(work, change, theirs, why)
  }
  fs.mkdirSync(buffer(target), { recursive: true })
  return { name, verdict: "applied", counts: work.inner.has(name) ? undefined : "counts", entry }
}

/** Whether somebody who had the old file open wrote into it after it was replaced: then it comes back. */
function recheck(work: Work, applied: Applied): Applied {
  const { name } = applied
  const swapped = work.swapped.get(name)
  if (!swapped || contentIdentity(swapped.old) === swapped.identity) return applied
  const target = `${work.root}/${name}`
  const stat = lstat(target)
  const why = "was written here while it was replaced"
  if (!stat && putBack(swapped.old, target)) return { name, verdict: "conflict", why }
  if (!stat || stat.isDirectory() || !exchange(swapped.old, target)) return keptOurs(work, name, swapped.old)
  return { name, verdict: "conflict", why, kept: keep(work, name, swapped.old), entry: applied.entry }
}

/** Where what is deleted at `name` waits for the end: on the same file system, out of the tree if that can be. */
function binFor(work: Work, name: Name): string {
  const directory = path.posix.dirname(`${work.root}/${name}`)
  if (deviceOf(directory) !== deviceOf(work.stage)) return beside(work, directory)
  const bin = `${work.bin}/${name}`
  fs.mkdirSync(buffer(path.posix.dirname(bin)), { recursive: true, mode: 0o700 })
  return bin
}

/** A staged file on the file system of its target: copied there if the stage lies on another one. */
function onDeviceOf(work: Work, target: string, staged: string): string {
  const directory = path.posix.dirname(target)
  if (deviceOf(directory) === deviceOf(work.stage)) return staged
  const copy = beside(work, directory)
  try {
    copyFile(staged, copy)
  } catch (error) {
    removeAll(copy) // half of it may have filled the file system
    throw error
  }
  return copy
}

/** A new name in a directory of the tree, removed at the end. */
function beside(work: Work, directory: string): string {
  const file = `${directory}/.edict-stage-${randomName()}`
  work.temporary.push(file)
  return file
}

const deviceOf = (file: string): bigint | undefined => lstat(file)?.dev
// ── 14. Commits: what the command did to git comes home as git's own objects ────────────────────────────
// A pack that git verifies, then refs by compare-and-swap, fast-forward only, then the index path by path. Files
// of .git never travel home.

/** What the command changed in git over there: `before` is what was uploaded. */
export type GitChanges = Readonly<{
  head?: Readonly<{ before?: string; after?: string }> // a ref's name, or an object's where HEAD is detached
  refs: readonly Readonly<{ name: string; before?: string; after?: string }>[]
  index: readonly Readonly<{ name: Name; before?: string; after?: string }>[] // MODE OID STAGE
  intents: readonly Name[] // added without content (git add -N)
}>

const OBJECT = /^([0-9a-f]{40}|[0-9a-f]{64})$/
/** Branches and tags, as git check-ref-format wants them. */
const REF =
  /^(?!.*(?:\.\.|@\{|\/[./]|\.lock(?:\/|$)|[./]$))refs\/(heads|tags)\/(?!-)[^\u0000-\u0020\u007f~^:?*[\\]+$/
const PACK_LIMIT = 4 * 2 ** 30 // bytes; git stops a pack beyond it

/** Lines `G+…`, `G-…`, `Ga…` of the agent → what changed in git; whatever is not well-formed is left out. */
export function parseGitChanges(answer: readonly string[]): GitChanges {
  const sides = new Map<string, { before?: string; after?: string }>()
  const put = (key: string, side: string, value: string) =>
    sides.set(key, { ...sides.get(key), [side === "+" ? "after" : "before"]: value })
  for (const line of answer) {
    const found = /^G([+-])([hri])(.*)$/s.exec(line)
    if (!found) continue
    const [, side, kind, rest] = found as unknown as [string, string, string, string]
    if (kind === "h") put("h", side, rest)
    const ref = kind === "r" ? /^(\S+) (.*)$/s.exec(rest) : null
    if (ref && OBJECT.test(ref[1]!) && REF.test(ref[2]!)) put(`r${ref[2]}`, side, ref[1]!)
    const staged = kind === "i" ? /^(\d{6} [0-9a-f]+ [0-3])\t(.*)$/s.exec(rest) : null
    if (staged) put(`i${staged[2]!.replaceAll("\u0001", "\n")}`, side, staged[1]!)
  }
  const of = (kind: string) =>
    [...sides]
      .filter(([key]) => key.startsWith(kind))
      .map(([key, value]) => ({ name: key.slice(1), ...value }))
  const intents = answer
    .filter((line) => line.startsWith("Ga"))
    .map((line) => line.slice(2).replaceAll("\u0001", "\n"))
  return { head: sides.get("h"), refs: of("r"), index: of("i"), intents }
}

/** Brings home commits, branches, tags and what is staged. Runs after the files were applied. */
async function bringCommitsHome(context: Context, tree: Tree, changes: GitChanges): Promise<void> {
  const detached =
    changes.head?.after && OBJECT.test(changes.head.after) ? [{ name: "HEAD", ...changes.head }] : []
  const refs = [...changes.refs.filter(({ after }) => after !== undefined), ...detached]
  const staged = changes.index.flatMap(({ after }) =>
    after && !after.startsWith("160000") ? [after.split(" ")[1]!] : [],
  )
  const base = [...changes.refs, changes.head ?? {}].flatMap(({ before }) =>
    before && OBJECT.test(before) ? [before] : [],
  )
  if (tree.kind !== "git" || (refs.length === 0 && changes.index.length === 0 && changes.head === undefined))
    return
  await fetchObjects(context, tree, { wanted: [...refs.map(({ after }) => after!), ...staged], base })
  const moved = new Map<string, boolean>()
  for (const ref of refs) moved.set(ref.name, await moveRef(context, tree, ref))
  const followed = await followHead(context, tree, changes)
  const branch =
    (await capture(git(tree.local, "symbolic-ref", "--quiet", "HEAD"), "may-fail")).trim() || "HEAD"
  if (followed && moved.get(branch) !== false) await mergeIndex(context, tree, changes)
}

/** Fetches the objects that are wanted and not here as one pack, which git verifies before it takes it. */
async function fetchObjects(
  context: Context,
  tree: Tree,
  objects: { wanted: readonly string[]; base: readonly string[] },
): Promise<void> {
  const wanted = [...new Set(objects.wanted)]
  const found = await capture(
    git(tree.local, "cat-file", "--batch-check"),
    "may-fail",
    Buffer.from(wanted.map((object) => `${object}\n`).join("")),
  )
  const missing = lines(found)
    .filter((line) => line.endsWith(" missing"))
    .map((line) => line.split(" ")[0]!)
  if (missing.length === 0) return
  const revisions = [...missing, ...objects.base.map((object) => `^${object}`)]
    .map((line) => `${line}\n`)
    .join("")
  const input = `${encodeScript(PACK_SCRIPT)}\n${tree.remote}\n${encodeWord(revisions)}\n`
  const unpack = git(
    tree.local,
    "index-pack",
    "--strict",
    "--fix-thin",
    "--stdin",
    `--max-input-size=${PACK_LIMIT}`,
  )
  const pack = await execute(context, pipeline([...sshArguments(context), BOOT_LINE], unpack), {
    input: Buffer.from(input, "latin1"),
    what: `retrieval of commits of ${shown(tree.local)}`,
    onCtrlC: "goes on",
  })
  const name = `objects/pack/pack-${pack.trim().replace(/^\w+\s+/, "")}.pack`
  const words = ["rev-parse", "--path-format=absolute", "--git-path", name]
  const file = await capture(git(tree.local, ...words), "may-fail")
  context.report.bytesDown += Number(lstat(file.replace(/\n$/, ""))?.size ?? 0n)
  await capture(git(tree.local, "rev-list", "--objects", "--quiet", ...missing, "--not", "--all"))
}

/** Moves a ref here as the command moved it there: only forward, and only if it is still what was uploaded. */
async function moveRef(
  context: Context,
  tree: Tree,
  ref: { name: string; before?: string; after?: string },
): Promise<boolean> {
  const { name, before, after } = ref
  const { host } = context.plan
  const here = (await capture(git(tree.local, "rev-parse", "--verify", "--quiet", name), "may-fail")).trim()
  if (here === after) return true
  const update = (target: string, old: string) =>
    succeeds(git(tree.local, "update-ref", "--no-deref", "-m", `edict: on ${host.name}`, target, after!, old))
  const forward =
    before !== undefined &&
    !name.startsWith("refs/tags/") &&
    (await succeeds(git(tree.local, "merge-base", "--is-ancestor", before, after!)))
  const nothing = "0".repeat(after!.length)
  if ((before === undefined || forward) && (await update(name, before ?? nothing))) {
    context.report.refs.push(name)
    return true
  }
  const waiting = `refs/edict/${host.name.replace(/[^A-Za-z0-9-]+/g, "-").replace(/^-+|-+$/g, "")}/${name.replace(/^refs\//, "")}`
  // What waits there already is kept, too, unless this is a continuation of it.
  const free =
    (await succeeds(git(tree.local, "merge-base", "--is-ancestor", waiting, after!))) ||
    !(await succeeds(git(tree.local, "rev-parse", "--verify", "--quiet", waiting)))
  const target = free ? waiting : `${waiting}-${context.run}`
  await capture(git(tree.local, "update-ref", target, after!))
  const why = forward || before === undefined ? "moved here meanwhile" : "was moved there, but not forward"
  context.report.conflicts.push({
    file: name,
    why: `${why}; theirs is ${target}`,
    hint: `git merge ${target}`,
  })
  return false
}

/** Switches to the branch that the command switched to, if HEAD here is still what was uploaded. */
async function followHead(context: Context, tree: Tree, { head }: GitChanges): Promise<boolean> {
  if (!head?.after || !head.before || OBJECT.test(head.after)) return true
  const here =
    (await capture(git(tree.local, "symbolic-ref", "--quiet", "HEAD"), "may-fail")).trim() ||
    (await capture(git(tree.local, "rev-parse", "HEAD"), "may-fail")).trim()
  if (here === head.after) return true
  const exists =
    REF.test(head.after) && (await succeeds(git(tree.local, "rev-parse", "--verify", "--quiet", head.after)))
  if (here !== head.before || !exists) {
    context.report.conflicts.push({
      file: "HEAD",
      why: `was switched to ${shown(head.after)} there, and here it is another branch by now; it stays`,
    })
    return false
  }
  await capture(
    git(tree.local, "symbolic-ref", "-m", `edict: on ${context.plan.host.name}`, "HEAD", head.after),
  )
  context.report.refs.push("HEAD")
  return true
}

/** Stages here what the command staged, path by path; a path that was staged here meanwhile stays as it is. */
async function mergeIndex(context: Context, tree: Tree, changes: GitChanges): Promise<void> {
  const staged = (await capture(git(tree.local, "ls-files", "--stage", "-z")))
    .split("\0")
    .filter((entry) => entry !== "")
  const here = new Map(
    staged.map((entry): [Name, string] => [
      entry.slice(entry.indexOf("\t") + 1),
      entry.slice(0, entry.indexOf("\t")),
    ]),
  )
  const intents = new Set(changes.intents)
  const wanted = changes.index.filter(
    ({ name, after }) => here.get(name) !== after && !intents.has(name) && unsafeName(name) === undefined,
  )
  const [free, taken] = partition(wanted, ({ name, before }) => here.get(name) === before)
  for (const { name } of taken)
    context.report.conflicts.push({
      file: text(name),
      why: "was staged here and there; what you staged stays",
    })
  const information = free
    .map(({ name, after }) => (after ? `${after}\t${name}\0` : `0 ${"0".repeat(40)}\t${name}\0`))
    .join("")
  if (information !== "")
    await capture(
      git(tree.local, "update-index", "-z", "--index-info"),
      "throws",
      Buffer.from(information, "latin1"),
    )
  const added = changes.intents.filter(
    (name) => !here.has(name) && unsafeName(name) === undefined && lstat(`${bytes(tree.local)}/${name}`),
  )
  if (added.length > 0)
    await capture(
      [
        "env",
        "GIT_LITERAL_PATHSPECS=1",
        ...git(
          tree.local,
          "add",
          "--force",
          "--intent-to-add",
          "--pathspec-from-file=-",
          "--pathspec-file-nul",
        ),
      ],
      "throws",
      Buffer.from(added.map((name) => `${name}\0`).join(""), "latin1"),
    )
  await capture(git(tree.local, "update-index", "-q", "--refresh"), "may-fail")
}

// ── 15. Remote scripts: what runs over there, in POSIX sh ───────────────────────────────────────────────
// The login shell, whatever it is, sees one of two fixed lines. The first reads a script and then requests on
// its standard input; the second waits in a fifo for the script that the first one hands it, so that its own
// standard input is the command's. Words travel as printf %b text and never become shell text.

/** Reads one line, decodes it and runs it; what follows on standard input belongs to that script. */
export const BOOT_LINE = `exec /bin/sh -c 'IFS= read -r script; eval "$(printf %b "$script")"'`

/** An agent that has not come after 20 seconds never will: the connection was given up between the two. No job of the shell. */
const AWAIT_AGENT = `[ -e "$run/agent" ] || ( (n=20; while [ -p "$run/go" ] && [ ! -e "$run/agent" ]; do [ "$n" -gt 0 ] || exec echo exit 254 >"$run/go"; n=$((n - 1)); sleep 1; done) </dev/null >/dev/null 2>&1 & );`

/** Waits for the script of run `id`; `directory` holds only [A-Za-z0-9._/-]. */
export const commandLine = (directory: string, id: string): string =>
  `exec /bin/sh -c 'mask=$(umask); umask 077; cd; run=${directory}/run/${id}; mkdir -p "$run" || exit 254; [ ! -e "$run/gone" ] || exit 254; mkfifo "$run/go" 2>/dev/null; ${AWAIT_AGENT} eval "$(cat "$run/go")"; exit 254'`

/** A word as printf's %b reads it: safe characters as they are, all other bytes octal, `-` for nothing. */
export function encodeWord(word: string, encoding: "utf8" | "latin1" = "utf8"): string {
  if (word === "") return "-"
  const octal = (byte: string) => `\\0${byte.charCodeAt(0).toString(8).padStart(3, "0")}`
  return Buffer.from(word, encoding)
    .toString("latin1")
    .replace(/^-|[^A-Za-z0-9./_-]/g, octal)
}

/** A script as the one line that BOOT_LINE reads. */
export const encodeScript = (script: string): string =>
  script.replaceAll("\\", "\\\\").replaceAll("\n", "\\n")

/** A shell script as text: $\\{ stands for the shell's own braces. */
const sh = (parts: TemplateStringsArray, ...values: string[]): string =>
  String.raw(parts, ...values).replaceAll("$\\{", "$" + "{")

/** Where nix is when a non-interactive shell does not have it on its PATH. */
const REMOTE_PATH = sh`
PATH=$PATH:$HOME/.nix-profile/bin:/nix/var/nix/profiles/default/bin:/run/current-system/sw/bin
PATH=$PATH:/etc/profiles/per-user/$(id -un)/bin:$HOME/.local/state/nix/profile/bin:/usr/local/bin:/opt/homebrew/bin
export PATH
`

/** Turns an encoded word back: decode WORD, then $decoded. */
const REMOTE_DECODE = sh`
decode() { case $1 in *\\*) decoded=$(printf '%b.' "$1"); decoded=$\{decoded%.} ;; *) decoded=$1 ;; esac; }
`

/** raw TEXT: prints what was encoded, NULs and all. The printf of FreeBSD's sh ends %b at the first NUL. */
export const REMOTE_RAW = sh`
{ whole=$(printf %b 'x\0000y'); } 2>/dev/null
case $whole in *y) whole=1 ;; *) whole= ;; esac
raw() {
  if [ -n "$whole" ]; then printf %b "$1"; return; fi
  printf '%s\n' "$1" | sed 's/\\0000/\
/g' | {
    IFS= read -r part && printf %b "$part"
    while IFS= read -r part; do printf '\000' && printf %b "$part"; done
  }
}
`

/** Answers requests, one a line (verb and encoded words); data lines start with a letter, the last with a dot. */
export const AGENT_SCRIPT = sh`
set -u -f
umask 077
cd || exit 254
trap '' PIPE HUP
${REMOTE_PATH}
LC_ALL=C
export LC_ALL
broken='' run='' started='' base='' reporter=''
soh=$(printf '\001')
${REMOTE_DECODE}
${REMOTE_RAW}
say() { printf '%s\n' "$*"; }
word() { if [ "$1" = - ]; then decoded=; else decode "$1"; fi; }

# One line for each path below . (or only below ./$1): type and mode/inode/size/mtime/ctime/name. Of .git, only
# what names commits and staged files. Anything weaker than inode and nanoseconds misses edits.
list() (
  cd "$tree" || exit 1
  start=. ; [ -z "$only" ] || start=./$only
  [ -e "$start" ] || [ -L "$start" ] || exit 0
  set -- -path '*/.git/objects' -prune -o -path '*/.git/logs' -prune -o -path '*/.git/hooks' -prune -o -path '*/.git/edict' -prune
  [ ! -s "$meta/prune" ] || while IFS= read -r pattern; do set -- "$@" -o -path "$pattern" -type d -prune; done <"$meta/prune"
  case $finder in
    gnu)
      { find "$start" -ignore_readdir_race "$@" -o -type d -printf 'd/////%p\0' -o -printf '%y%m/%i/%s/%T@/%C@/%p\0'; echo "$?" >"$meta/found"; } | tr '\n\0' '\001\n'
      IFS= read -r code <"$meta/found" && [ "$code" = 0 ] ;;
    *)
      find "$start" "$@" -o -print0 >"$meta/names" || exit 1
      if [ "$finder" = bsd ]; then xargs -0 stat -f 'x%Xp/%i/%z/%Fm/%Fc' <"$meta/names"; else xargs -0 stat -c 'x%f/%i/%s/%y/%z' <"$meta/names"; fi >"$meta/stats" || exit 1
      tr '\n\0' '\001\n' <"$meta/names" >"$meta/lines" || exit 1
      paste -d/ "$meta/stats" "$meta/lines" >"$meta/rows" || exit 1
      sed 's,^x4[^/]*/[^/]*/[^/]*/[^/]*/[^/]*/,d/////,' "$meta/rows" ;;
  esac
)

# What stat says of one path after the other, names between zero bytes.
stat_each() {
  case $finder in
    bsd) xargs -0 stat -f '%Xp/%i/%z/%Fm/%Fc' ;;
    gnu) xargs -0 stat -c '%f/%i/%s/%.9Y/%.9Z' ;;
    *) TZ=UTC0 xargs -0 stat -c '%f/%i/%s/%y/%z' ;;
  esac
}

# Where walking takes long: what stat says of every path of the base, of directories too, two halves at once. As long as
# that is what it was, the listing is. The first line says which base and which exceptions that holds for.
basis() { printf '%s\0' "$meta/base" | stat_each && cksum <"$meta/prune"; }
stats() (
  cd "$tree" || exit 1
  stat_each <"$meta/names.1" >"$meta/half.$$" &
  stat_each <"$meta/names.2" >"$meta/other.$$" && wait "$!" && basis && cat "$meta/half.$$" "$meta/other.$$"
  code=$?
  rm -f "$meta/half.$$" "$meta/other.$$"
  exit "$code"
)

# list_again FILE: the listing, without a walk if it can be had so
list_again() {
  if [ -s "$meta/stats" ] && [ "$(basis)" = "$(sed 2q "$meta/stats")" ] && stats 2>/dev/null >"$meta/stats.$$" && cmp -s "$meta/stats" "$meta/stats.$$"; then
    rm -f "$meta/stats.$$"
    cp "$meta/base" "$1"
    return
  fi
  rm -f "$meta/stats" "$meta/stats.$$"
  list >"$1"
}

# Remembers the above after a walk of a large tree that found the base. What changed since the walk began shows: no ctime
# may be as young as the file that was made before it.
remember_stats() {
  [ ! -e "$meta/stats" ] && lines=$(wc -l <"$meta/base") && [ "$lines" -gt 2000 ] && was=$(basis) && cmp -s "$meta/base" "$meta/after" || return 0
  for half in 1 2; do
    if [ "$half" = 1 ]; then sed "$((lines / 2))q" "$meta/base"; else sed "1,$((lines / 2))d" "$meta/base"; fi |
      sed 's,^[^/]*/[^/]*/[^/]*/[^/]*/[^/]*/,,' | tr '\n\001' '\0\n' >"$meta/names.$half"
  done
  began=$(printf '%s\0' "$meta/began" | stat_each)
  # Another run may have begun by now, with another base.
  if stats >"$meta/stats.$$" && [ "$was" = "$(sed 2q "$meta/stats.$$")" ] && sed 1,2d "$meta/stats.$$" | awk -F/ -v began="$\{began##*/}" '$5 "" >= began "" { exit 1 }'; then
    mv "$meta/stats.$$" "$meta/stats"
  else rm -f "$meta/stats.$$"; fi
}

# Lines of listing $2 that $1 lacks (+), and the other way round (-); links with their text.
differences() {
  ! cmp -s "$1" "$2" || { true >"$meta/diff"; return 0; }
  awk -v first="$1" 'BEGIN { while ((getline line <first) > 0) old[line] }
    { if ($0 in old) delete old[$0]; else print "+" $0 } END { for (line in old) print "-" line }' "$2" >"$meta/diff" || return 1
  sed -n '/^[+]l/p; /^[+]x[aA]/p' "$meta/diff" | while IFS= read -r line; do
    name=$(printf '%s.' "$\{line#*/*/*/*/*/}" | tr '\001' '\n'); name=$\{name%.}
    text=$(readlink "$tree/$name" && echo .); text=$\{text%??}
    printf 't%s\n' "$(printf '%s' "$text" | tr '\n' '\001')"
    printf 'n%s\n' "$\{line#*/*/*/*/*/}"
  done
  cat "$meta/diff"
}

# What names commits, and what is staged: h HEAD, r OID REF, i MODE OID STAGE and name.
git_state() {
  { git -C "$tree" symbolic-ref -q HEAD || git -C "$tree" rev-parse -q --verify HEAD; } | sed 's/^/h/'
  git -C "$tree" for-each-ref --format='r%(objectname) %(refname)' refs/heads refs/tags
  git -C "$tree" ls-files --stage -z | tr '\n\0' '\001\n' | sed 's/^/i/'
}

# The same as differences, of git_state, if anything in .git changed; a is a file that was added without content.
git_differences() {
  [ -s "$meta/git" ] && grep -q '/\./\.git/' "$meta/diff" || return 0
  git_state >"$meta/git.after" || return 1
  awk -v first="$meta/git" 'BEGIN { while ((getline line <first) > 0) old[line] }
    { if ($0 in old) delete old[$0]; else print "G+" $0 } END { for (line in old) print "G-" line }' "$meta/git.after"
  git -C "$tree" diff --no-ext-diff --name-only --diff-filter=A -z | tr '\n\0' '\001\n' | sed 's/^/Ga/'
}

aside() { mkdir -p "$meta/aside" && mv -- "$1" "$meta/aside/$(date +%s).$$.$\{1##*/}"; }

# Moves what was uploaded into its place, directory by directory; a directory in the way of a file goes aside.
place() (
  cd "$meta/in" || exit 1
  [ ! -s "$meta/mkdir" ] || xargs -0 mkdir -p -- <"$meta/mkdir" || exit 1
  if [ -z "$only" ] && rmdir "$tree" 2>/dev/null; then cd .. && exec mv in "$tree"; fi
  mkdir -p "$tree" "$meta/aside" || exit 1
  find . -type d -print0 | tr '\n\0' '\001\n' >"$meta/directories" || exit 1
  while IFS= read -r d; do
    case $d in *"$soh"*) d=$(printf '%s.' "$d" | tr '\001' '\n'); d=$\{d%.} ;; esac
    if [ -L "$tree/$d" ] || [ -f "$tree/$d" ]; then rm -f -- "$tree/$d" || exit 1; fi
    mkdir -p -- "$tree/$d" || exit 1
    find "$d" -maxdepth 1 ! -type d -exec /bin/sh -c '
      to=$1 aside=$2; shift 2
      for f; do
        f=$\{f##*/}
        if [ -d "$to/$f" ] && [ ! -L "$to/$f" ]; then mv -- "$to/$f" "$aside/$f.$$" || exit 1; fi
      done
      exec mv -f -- "$@" "$to/"' sh "$tree/$d" "$meta/aside" {} + || exit 1
  done <"$meta/directories"
)

# dated SECONDS FILE: sets its mtime; GNU and BusyBox first, then BSD
dated() { touch -d "@$1" "$2" 2>/dev/null || touch -t "$(date -r "$1" +%Y%m%d%H%M.%S)" "$2"; }

# Makes $1, in seconds, the newest mtime below the current directory: rsync, tar and mkdir leave directories newer.
date_back() {
  dated "$1" "$meta/stamp" || return 1
  find . \( -type d -o -newer "$meta/stamp" \) -exec touch -h -r "$meta/stamp" {} +
}

# What an upload that did not come to its end left is not the next one's.
forget_upload() { rm -rf "$meta/in" "$meta/remove" "$meta/rmdir" "$meta/mkdir" "$meta/newest"; }

# Finishes an upload that came whole; safe to repeat after a crash.
settle() {
  mkdir -p "$tree" || return 1
  [ ! -s "$meta/remove" ] || (cd "$tree" && xargs -0 /bin/sh -c 'for f; do shift; if [ -L "$f" ] || [ -f "$f" ]; then set -- "$@" "$f"; fi; done; [ "$#" = 0 ] || exec rm -f -- "$@"' sh <"$meta/remove") || return 1
  [ ! -s "$meta/rmdir" ] || (cd "$tree" && xargs -0 rmdir -- <"$meta/rmdir") 2>/dev/null || :
  [ ! -d "$meta/in" ] || place || return 1
  if [ ! -s "$meta/newest" ] && [ -d "$tree/.git" ] && command -v git >/dev/null; then
    while IFS= read -r prefix; do
      case $prefix in *.git/) git -C "$tree/$prefix.." update-index -q --refresh ;; esac
    done <"$meta/prefixes" >/dev/null 2>&1
    git_state >"$meta/git" 2>/dev/null || rm -f "$meta/git"
  fi
  if [ -s "$meta/newest" ]; then (cd "$tree" && date_back "$(cat "$meta/newest")") 2>/dev/null || :; fi
  list >"$meta/base.new" && mv "$meta/base.new" "$meta/base" || return 1
  ls -di "$tree" >"$meta/root" && mv "$meta/next" "$meta/token" || return 1
  forget_upload && rm -f "$meta/running"
}

# select ID: the tree that the following lines are about
select_tree() {
  meta=$base/meta/$1
  { IFS= read -r tree && IFS= read -r only; } <"$meta/path" || return 1
  case $tree in /*) ;; *) tree=$HOME/$tree ;; esac
}

# Trees that nobody used for 30 days go, unless one that is used lies in them.
expire() {
  find "$1/run" -mindepth 1 -maxdepth 1 -type d -mtime +2 -exec rm -rf -- {} + 2>/dev/null
  find "$base/meta" -mindepth 1 -maxdepth 1 -type d -mtime +30 2>/dev/null | while IFS= read -r old; do
    select_tree "$\{old##*/}" || continue
    [ -n "$only" ] || (set +f; cat "$base"/meta/*/path) 2>/dev/null | grep -qF -- "$\{tree#"$HOME/"}/" || rm -rf -- "$tree"
    rm -rf -- "$meta"
  done
}

# seed_tree ID BASE TOKENS: starts a tree as a copy of the same tree in another slot. A run may be changing that one:
# what differs from its agreed state after the copy is named, and then not relied on.
seed_tree() {
  to=$tree mine=$meta here=$base base=$2
  select_tree "$1" && from=$meta && token=$(cat "$from/token") && [ -z "$only" ] && [ ! -e "$from/next" ] &&
    case " $3 " in *" $token "*) ;; *) false ;; esac && cp -Rp "$tree/." "$to/" && meta=$mine && list >"$mine/now" &&
    [ "$(cat "$from/token")" = "$token" ] && [ ! -e "$from/next" ] && cp "$from/base" "$mine/seed"
  seeded=$?
  tree=$to meta=$mine base=$here
  return "$seeded"
}

do_hello() {
  base=$1
  say # ends what the login shell may have printed
  case $base in /*) ;; *) base=$HOME/$base ;; esac
  for tool in find stat awk tr xargs tar sed paste mkfifo cmp readlink; do
    command -v "$tool" >/dev/null || { why="needs $tool over there"; return 1; }
  done
  finder=stat
  # shellcheck disable=SC2185
  if find --version 2>/dev/null | grep -q GNU; then finder=gnu; elif ! stat -c %i / >/dev/null 2>&1; then finder=bsd; fi
  run=$2/run/$3
  mkdir -p "$base/meta" "$run" || { why="cannot write to $base"; return 1; }
  echo "$$" >"$run/agent"
  expire "$2"
  say "f home $HOME"
  say "f base $base"
  say "f store $(command -v nix-store)"
  for tool in git nix zstd gzip; do if command -v "$tool" >/dev/null; then say "f $tool yes"; fi; done
}

# tree ID PATH ONLY PRUNE TOKENS PREFIXES SEED STATE: is the tree what the other side takes it for?
do_tree() {
  mkdir -p "$base/meta/$1" || { why="cannot write to $base"; return 1; }
  word "$3"; printf '%s\n%s\n' "$2" "$decoded" >"$base/meta/$1/path"
  select_tree "$1" || return 1
  touch "$meta"
  word "$4"; printf '%s' "$decoded" >"$meta/prune"
  mkdir -p "$tree" || { why="cannot make $tree"; return 1; }
  if [ -e "$meta/next" ]; then rm -f "$meta/look"; settle || rm -f "$meta/next" "$meta/token"; fi
  forget_upload
  [ "$8" = same ] || say "r $(command -v rsync >/dev/null && rsync --version 2>&1 | sed 1q)"
  word "$6"
  printf '%s\n' "$decoded" >"$meta/prefixes"
  while IFS= read -r prefix; do mkdir -p "$meta/in/$prefix" || exit 1; done <"$meta/prefixes" || { why="cannot write to $meta"; return 1; }
  token=$(cat "$meta/token" 2>/dev/null) || token=
  word "$5"
  case " $decoded " in *" $token "*) known=1 ;; *) known= ;; esac
  if [ -n "$token" ] && [ -n "$known" ] && { [ -n "$only" ] || [ "$(ls -di "$tree")" = "$(cat "$meta/root" 2>/dev/null)" ]; }; then
    if [ -e "$meta/look" ]; then mv "$meta/look" "$meta/now"; else list_again "$meta/now"; fi || { why="cannot list $tree"; return 1; }
    if cmp -s "$meta/base" "$meta/now"; then say "s same $token"; return 0; fi
    [ "$8" = any ] || { why=unexpected; return 1; }
    case $(cat "$meta/running" 2>/dev/null) in
      '') say "s drifted $token" ;;
      all) say "s interrupted $token" ;;
      *) say "s discarded $token" ;;
    esac
    differences "$meta/base" "$meta/now" && git_differences
    return
  fi
  [ "$8" = any ] || { why=unexpected; return 1; }
  if [ -n "$only" ]; then [ ! -e "$tree/$only" ] || aside "$tree/$only"; else rmdir "$tree" 2>/dev/null || aside "$tree"; mkdir -p "$tree"; fi || return 1
  rm -f "$meta/token" "$meta/base" "$meta/git"
  word "$7"
  if [ -n "$decoded" ]; then
    seed=$decoded
    case $seed in /*) ;; *) seed=$HOME/$seed ;; esac
    word "$5"
    if seed_tree "$1" "$seed" "$decoded" 2>/dev/null; then say "s discarded $token"; differences "$meta/seed" "$meta/now"; return; fi
    rm -rf "$tree" && mkdir -p "$tree" || return 1
  fi
  say "s fresh -"
}

# list ID NAME WORD: one of the lists that commit works on
do_list() { select_tree "$1" && raw "$3" >"$meta/$2"; }

# file ID TYPE MODE SECONDS NAME CONTENT: a small part of an upload
do_file() {
  select_tree "$1" || return 1
  word "$5"
  file=$meta/in/$decoded
  why="cannot write to $meta"
  mkdir -p "$\{file%/*}" || return 1
  case $2 in
    directory) mkdir -p "$file" ;;
    link) word "$6"; ln -s "$decoded" "$file" ;;
    *) { [ "$6" = - ] || raw "$6"; } >"$file" && chmod "$3" "$file" && { dated "$4" "$file" 2>/dev/null || :; } ;;
  esac
}

# commit ID TOKEN: the upload is whole, put it in its place
do_commit() {
  select_tree "$1" || return 1
  why="cannot put the upload in its place"
  printf '%s\n' "$2" >"$meta/next.new" && mv "$meta/next.new" "$meta/next" && settle
}

# input ID NAME: a locked input of a flake goes into the store, where Nix looks for it first
do_input() {
  why="cannot add an input to the store"
  select_tree "$1" && nix --extra-experimental-features nix-command store add-path --name "$2" "$tree" >/dev/null
}

# missing PATH…: which store paths are not valid there
do_missing() { for p; do word "$p"; say "$decoded"; done | xargs nix-store --check-validity --print-invalid | sed 's/^/p /'; }

# valid PATH…: whether all of these are valid there
do_valid() { why=unexpected; [ -z "$(do_missing "$@")" ]; }

# Links in each of the link directories: directory number/inode/ctime/./name.
links() (
  number=0
  while IFS= read -r directory; do
    number=$((number + 1))
    cd "$directory" || continue
    if [ "$finder" = bsd ]; then find . -maxdepth 1 -type l -exec stat -f "$number/%i/%Fc/%N" {} +
    else find . -maxdepth 1 -type l -exec stat -c "$number/%i/%z/%n" {} +; fi
  done <"$run/directories"
)

# What the command says of itself: that it starts, that its terminal stopped (Ctrl-Z) or ended it (Ctrl-C), its exit code.
await_command() {
  code=
  while IFS= read -r state; do
    case $state in
      started) say .started ;;
      stopped) true >"$run/paused"; true >"$run/stopped"; say .stopped ;;
      interrupted) true >"$run/signalled" ;;
      *) code=$state ;;
    esac
  done <"$run/done"
}

report() {
  [ ! -e "$run/signalled" ] || stop_command 6
  [ ! -e "$run/unheard" ] || say q
  say "x $\{code:-137}"
  links >"$run/links.after"
  awk -v first="$run/links.before" 'BEGIN { while ((getline line <first) > 0) old[line] = 1 } !($0 in old)' "$run/links.after" |
    sed 's,/.*/\./, ,' | while IFS= read -r link; do
      say "l $link"
      say "t$(readlink "$(sed -n "$\{link%% *}p" "$run/directories")/$\{link#* }")"
    done
  while read -r id _; do
    select_tree "$id" || continue
    say "d $id"
    true >"$meta/began"
    if list_again "$meta/after"; then differences "$meta/base" "$meta/after" && git_differences; else say "e cannot list $tree"; fi
  done <"$run/watched"
}

remember() {
  exec >/dev/null 2>&1 <"$run/watched" # the other side does not wait for this
  while read -r id _; do select_tree "$id" && remember_stats; done
}

# What the results need, but for results that are there already.
closures() {
  sed -n 's,^t\(/nix/store/[^/]*\)$,\1,p' "$run/report" |
    awk -v known="$run/known" 'BEGIN { while ((getline line <known) > 0) seen[line] = 1 } !seen[$0]++' >"$run/results"
  [ -s "$run/results" ] || return 0
  xargs nix-store --query --requisites <"$run/results" 2>/dev/null | awk '!seen[$0]++' >"$run/closure"
  xargs nix-store --query --size <"$run/closure" >"$run/sizes" 2>/dev/null
  paste -d' ' "$run/sizes" "$run/closure" | sed 's/^/c /'
}

# run SCRIPT WATCHED DIRECTORIES KNOWN WORD…: hand the command to the other channel, answer when it has ended
do_run() {
  mkfifo "$run/done" "$run/on" || { why="cannot write to $run"; return 1; }
  [ -p "$run/go" ] || mkfifo "$run/go" 2>/dev/null || [ -p "$run/go" ] || { why="cannot write to $run"; return 1; }
  word "$1"; script=$decoded
  word "$2"; printf '%s' "$decoded" >"$run/watched"
  word "$3"; printf '%s' "$decoded" | while IFS= read -r d; do case $d in /*) ;; *) d=$HOME/$d ;; esac; mkdir -p "$d"; printf '%s\n' "$d"; done >"$run/directories"
  word "$4"; printf '%s' "$decoded" >"$run/known"
  shift 4
  word "$\{1#d}"
  case $decoded in /*) mkdir -p "$decoded" ;; *) mkdir -p "$HOME/$decoded" ;; esac
  printf '%s\n' "$@" >"$run/words"
  links >"$run/links.before"
  while read -r id home; do printf '%s\n' "$home" >"$base/meta/$id/running"; done <"$run/watched"
  started=1
  { printf 'run=%s\n%s\n' "$run" "$script" >"$run/go"; await_command; report >"$run/report"; cat "$run/report"; closures; true >"$run/reported"; say .ok; remember; } &
  reporter=$!
  (exec </dev/null >/dev/null 2>&1; watchdog) &
}

# Whether any byte came over this connection in the last 5 seconds.
was_heard() {
  # shellcheck disable=SC2086
  set -- $\{SSH_CONNECTION-}
  [ "$#" = 4 ] && last=$(ss -tinH "sport = :$4 and dport = :$2" | sed -n 's/.*lastrcv:\([0-9]*\).*/\1/p' | sort -n | sed 1q) && [ "$\{last:-5000}" -lt 5000 ]
}

# Ends the command when the other side was not heard for 6 seconds: a network may die without a word. It calls every
# second: so a network may stand still for 5 seconds, or for 3 if it also loses packets (TCP doubles the time between
# its repetitions). With the second that a process has to end by itself, nothing is left 9 seconds after the last call.
# Where ss (of Linux) says so, whatever came over the connection counts: calls wait behind what a slow line still has to
# carry.
watchdog() {
  quiet=0
  while sleep 1; do
    { [ -d "$run" ] && [ ! -e "$run/reported" ]; } || exit 0
    if [ -e "$run/alive" ] || [ -e "$run/paused" ]; then rm -f "$run/alive"; quiet=0; else quiet=$((quiet + 1)); fi
    if [ "$quiet" -lt 6 ] || was_heard; then continue; fi
    true >"$run/unheard"
    stop_command 2
    break
  done
  sleep 30 # if the network comes back the other side hears what became of the command
  if [ -e "$run/agent" ] && [ ! -e "$run/alive" ]; then kill "$$"; fi
}

# Every process below process $1, deepest first.
below() {
  ps -A -o pid= -o ppid= | awk -v root="$1" '{ up[$1] = $2 } END { for (p in up) { q = p; while (q in up && q != root && q > 1) q = up[q]; if (q == root && p != root) print p } }'
}

# What the command started: below process $1, in its session, or with this run's name in its environment.
family() {
  below "$1"
  [ ! -r /proc/self/stat ] || (
    set +f
    cat /proc/[0-9]*/stat | sed 's/ (.*) / /' | awk -v session="$1" '$5 == session { print $1 }'
    grep -ls "EDICT_RUN=$\{run##*/}" /proc/[0-9]*/environ | sed 's/[^0-9]//g'
  ) 2>/dev/null
}

# The process group of the command: at a terminal not that of process $1, which started it. None before and after.
group() { ps -A -o ppid= -o pgid= | awk -v parent="$1" '$1 == parent { found = $2 } END { if (found) print found }'; }

alive() { for p; do kill -0 "$p" 2>/dev/null && return 0; done; return 1; }

# Ends the command and all that it started: politely first, for $1 half seconds.
stop_command() {
  pid=$(cat "$run/pid" 2>/dev/null) || return 0
  left=$1
  all=$(family "$pid")
  command=$(group "$pid")
  set -- "-$pid" "-$\{command:-$pid}"
  kill -s TERM -- "$@" 2>/dev/null # at once, so that no script goes on to its next command
  # shellcheck disable=SC2086
  kill -TERM $all 2>/dev/null
  # shellcheck disable=SC2086
  kill -s CONT -- "$@" $all 2>/dev/null
  # shellcheck disable=SC2086
  while [ "$left" -gt 0 ] && alive $all; do sleep 0.5 2>/dev/null || sleep 1; left=$((left - 1)); done
  kill -s KILL -- "$@" 2>/dev/null
  # shellcheck disable=SC2086
  for _ in 1 2 3; do kill -s KILL $all 2>/dev/null; all=$(family "$pid"); [ -n "$all" ] || break; done # what was just forked, too
}

# Sets command to the process group of the command, which may have been handed over a moment ago.
await_group() {
  for _ in 1 2 3 4 5; do
    pid=$(cat "$run/pid" 2>/dev/null)
    command=$(group "$\{pid:-none}")
    [ -z "$command" ] || return 0
    sleep 0.2 2>/dev/null || sleep 1
  done
  command=$pid
  [ -n "$command" ]
}

# signal NAME: the command gets it. At a keyboard a second Ctrl-C says that the first was not enough; else time does.
do_signal() {
  await_group || return 0
  true >"$run/signalled"
  kill -s "$1" -- "-$command"
  [ "$1" = INT ] || (exec </dev/null >/dev/null 2>&1; sleep_while_running 6 && stop_command 6) &
}

# Ctrl-Z without a terminal over there. With one, the command stops by itself.
do_pause() {
  await_group || return 0
  true >"$run/paused"
  kill -s STOP -- "-$command"
}

# fg, whichever way it was stopped.
do_resume() {
  [ -e "$run/paused" ] && await_group || return 0
  true >"$run/alive"
  rm -f "$run/paused"
  if [ -e "$run/stopped" ]; then rm -f "$run/stopped"; echo on >"$run/on" & else kill -s CONT -- "-$command"; fi
}

sleep_while_running() {
  left=$1
  while [ "$left" -gt 0 ]; do sleep 1; { [ -d "$run" ] && [ ! -e "$run/reported" ]; } || return 1; left=$((left - 1)); done
}

# agreed ID TOKEN: what the command changed is home; from here on this is the agreed state
do_agreed() {
  select_tree "$1" && printf '%s\n' "$2" >"$meta/token.new" && { cmp -s "$meta/after" "$meta/base" || mv "$meta/after" "$meta/base"; } && { [ ! -e "$meta/git.after" ] || mv "$meta/git.after" "$meta/git"; } && mv "$meta/token.new" "$meta/token" && rm -f "$meta/running"
}

while IFS= read -r line; do
  # shellcheck disable=SC2086
  set -- $line
  verb=$1
  shift
  case $verb in
    look) if select_tree "$1"; then list_again "$meta/look" || rm -f "$meta/look"; fi ;;
    alive) [ -z "$run" ] || true >"$run/alive" ;;
    pause | resume | signal) "do_$verb" "$@" 2>/dev/null ;;
    agreed) do_agreed "$@" ;;
    run) if [ -n "$broken" ]; then say ".fail an earlier step failed"; else do_run "$@" || { broken=1; say ".fail $why"; }; fi ;;
    again) broken=; say .ok ;;
    hello | tree | list | file | commit | input | missing | valid)
      why="$verb failed"
      if [ -n "$broken" ]; then say ".fail an earlier step failed"; elif "do_$verb" "$@"; then say .ok; else broken=1; say ".fail $why"; fi ;;
    *) say ".fail unknown request" ;;
  esac
done

# The other side is gone, or done. Whatever still runs for it ends.
if [ -n "$run" ]; then
  if [ -e "$run/reported" ]; then rm -rf "$run"; exit 0; fi
  true >"$run/gone"
  [ -z "$started" ] || stop_command 6
  (printf 'exit 254\n' >"$run/go") & sleep 1; kill "$!" "$reporter" 2>/dev/null
  rm -f "$run/go" "$run/done" "$run/on" "$run/words" "$run/pid" "$run/alive" "$run/agent"
fi
`

/**
 * pack ACCEPTED [OPTION…]: files and links below the current directory, named on standard input, as a tar stream, with
 * whichever tar is there. ACCEPTED and OPTION are for GNU tar: an exit code that is no failure, what else to pass. The
 * format is one that every tar reads; macOS would add a ._file with attributes to each file.
 */
const PACK_FUNCTION = sh`
pack() {
  accepted=$1 kind=$(tar --version 2>/dev/null)
  shift
  COPYFILE_DISABLE=1
  export COPYFILE_DISABLE
  case $kind in
    *GNU*) tar "$@" -cf - --null --no-recursion -T - || [ "$?" = "$accepted" ] ;;
    *bsdtar*) tar --format gnutar -cf - --null --no-recursion -T - ;;
    *)
      stage=$(mktemp -d) || return 1
      xargs -0 /bin/sh -c 'for f; do mkdir -p "$0/$\{f%/*}" && cp -Pp -- "$f" "$0/$f" || exit 1; done' "$stage" && tar -cf - -C "$stage" .
      set -- "$?"
      rm -rf "$stage"
      return "$1" ;;
  esac
}
`

/** Here, in the directory that its first word names: a file that changes meanwhile is no failure (GNU tar's 1). */
export const SEND_SCRIPT = sh`
${PACK_FUNCTION}
cd "$1" && pack 1
`

/** Sends the named files of a tree as a tar stream. */
export const FETCH_SCRIPT = sh`
${REMOTE_RAW}
${PACK_FUNCTION}
IFS= read -r tree
IFS= read -r names
case $tree in /*) ;; *) tree=$HOME/$tree ;; esac
cd "$tree" || exit 1
raw "$names" | pack 0 --ignore-failed-read
`

/**
 * Takes an upload that comes as a tar stream: with its modes, but nobody's names. Hard links become files of their own,
 * as rsync makes them; what lies in a .git is another stream's.
 */
export const UNPACK_SCRIPT = sh`
${REMOTE_DECODE}
IFS= read -r place
decode "$place"
case $decoded in /*) ;; *) decoded=$HOME/$decoded ;; esac
umask 077
cd "$decoded" || exit 1
tar -xpof - || exit 1
cat >/dev/null # padding: who sends it must not fail
find . -name .git -prune -o -type f -links +1 -exec /bin/sh -c '
  copy=$(mktemp) || exit 1
  for f; do cp -p -- "$f" "$copy" && rm -f -- "$f" && cp -p -- "$copy" "$f" || exit 1; done
  rm -f "$copy"' sh {} +
`

/**
 * Takes locked inputs as a tar stream into the store: one after the other under the name "source", which the store path
 * of an input is made of. PAIRS: what each is called in the archive, and the store path that it must become.
 */
export const INPUTS_SCRIPT = sh`
${REMOTE_PATH}
${REMOTE_DECODE}
IFS= read -r run
IFS= read -r packed
IFS= read -r pairs
umask 077
cd && mkdir -p "$run/inputs/add" && cd "$run/inputs" || exit 1
free() { find . -type d ! -perm -700 -exec chmod u+rwx {} + 2>/dev/null; }
trap 'free; cd .. && rm -rf inputs' EXIT
case $packed in
  zstd | gzip) "$packed" -d -c | tar -xof - ;;
  *) tar -xof - ;;
esac || exit 1
cat >/dev/null # padding: who sends it must not fail
free
set -f
decode "$pairs"
# shellcheck disable=SC2086
set -- $decoded
while [ $# -gt 1 ]; do
  mv -- "$1" add/source && path=$(nix-store --add add/source) || exit 1
  [ "$path" = "$2" ] || { echo "error: the input $2 came as $path" >&2; exit 1; }
  rm -rf add/source
  shift 2
done
`

/** Lists store paths as differences does what is new: type and mode, size and name, then the texts of links. */
export const OUTPUTS_SCRIPT = sh`
set -f
LC_ALL=C
export LC_ALL
IFS= read -r names
# shellcheck disable=SC2046
set -- $(printf '%b' "$names")
cd /nix/store || exit 1
# shellcheck disable=SC2185
if find --version 2>/dev/null | grep -q GNU; then
  find "$@" -printf '+%y%m//%s///%p\0' -type l -printf 't%l\0n%p\0' 2>/dev/null | tr '\n\0' '\001\n'
else
  work=$(mktemp -d) || exit 1
  trap 'rm -rf "$work"' EXIT
  find "$@" -print0 >"$work/names" 2>/dev/null
  if stat -c %s / >/dev/null 2>&1; then set -- -c '+x%f//%s//' "$@"; else set -- -f '+x%Xp//%z//' "$@"; fi
  if [ -s "$work/names" ]; then xargs -0 stat "$1" "$2" <"$work/names" >"$work/stats" || exit 1; fi
  shift 2
  [ ! -s "$work/names" ] || tr '\n\0' '\001\n' <"$work/names" | paste -d/ "$work/stats" -
  find "$@" -type l -exec /bin/sh -c 'for f; do
    text=$(readlink "$f" && echo .)
    for word in "t$\{text%??}" "n$f"; do printf %s "$word" | tr "\n" "\001"; echo; done
  done' sh {} + 2>/dev/null
fi
echo end
`

/** Sends a pack of the named commits, thin: its deltas may lean on what the other side has. */
export const PACK_SCRIPT = sh`
IFS= read -r tree
IFS= read -r revisions
case $tree in /*) ;; *) tree=$HOME/$tree ;; esac
printf '%b' "$revisions" | exec git -C "$tree" pack-objects -q --revs --thin --delta-base-offset --stdout
`

/** Runs in the other channel, with $run set: the words of the command, in its directory, with the caller's streams. */
export const COMMAND_SCRIPT = sh`
exec 9>"$run/done" 7<>"$run/on"
finish() { echo "$1" >&9; exit "$1"; }
trap 'finish 130' INT
trap 'finish 143' TERM
trap 'finish 129' HUP
echo "$$" >"$run/pid"
${REMOTE_PATH}
${REMOTE_DECODE}
fail() { printf 'edict: %s\n' "$1" >&2; finish 254; }
# Before Nix 2.19 the words of nix flake update are flakes, since then names of inputs.
takes_inputs() {
  version=$(nix --version 2>/dev/null) && version=$\{version##* } || return 1
  minor=$\{version#*.}
  [ "$\{version%%.*}" -gt 2 ] || [ "$\{minor%%[!0-9]*}" -ge 19 ]
}
set --
directory='' settings=''
while IFS= read -r line; do
  decode "$\{line#?}"
  case $line in
    d*) directory=$decoded ;;
    e*) export "$\{decoded?}" ;;
    c*) settings="$settings
$decoded" ;;
    w*) set -- "$@" "$decoded" ;;
    p*) word=$decoded ;;
    h*) case $decoded in /*) word=$word$decoded ;; *) word=$word$HOME/$decoded ;; esac ;;
    s*) set -- "$@" "$word$decoded" ;;
    u*) if takes_inputs; then set -- "$@" --flake "$decoded"; else set -- "$@" "$decoded"; fi ;;
  esac
done <"$run/words"
rm -f "$run/words"
case $directory in /*) ;; *) directory=$HOME/$directory ;; esac
cd "$directory" || fail "cannot enter $directory over there"
command -v "$1" >/dev/null || fail "no $1 over there: not on the PATH of a non-interactive shell, nor in a Nix profile; install Nix there, or set its PATH"
NIX_CONFIG="$\{NIX_CONFIG:+$NIX_CONFIG
}extra-experimental-features = nix-command flakes$settings"
export NIX_CONFIG
EDICT_RUN=$\{run##*/}
export EDICT_RUN
umask "$mask"
trap : INT QUIT TERM HUP
unset mask run line directory decoded settings word version minor
# The shell that waits need not say that a signal ended the command.
run() {
  exec 8>&2 2>/dev/null
  trap : INT QUIT TERM HUP
  (exec 2>&8 7<&- 8>&- 9>&-; exec "$@") # in two steps: bash 3.2 leaves copies of what one step closes
}
echo started >&9
[ ! -t 0 ] || set -m # the command as a job, which Ctrl-Z at the terminal can stop; for bash 2 is the terminal then
(run "$@")
code=$?
while kill -0 %+ 2>/dev/null; do
  echo stopped >&9
  IFS= read -r _ <&7
  fg >/dev/null
  code=$?
done
[ ! -t 0 ] || [ "$code" != 130 ] || echo interrupted >&9
finish "$code"
`
// ── 16. Session: requests to the agent, answers from it ─────────────────────────────────────────────────

/** The agent at the other end. Its input's end tells it that this program is gone, however that came about. */
type Session = Readonly<{
  ask: (verb: string, ...words: string[]) => Promise<string[]> // data lines of the answer; throws EdictError
  askBytes: (verb: string, ...words: string[]) => Promise<string[]> // the same, each character of a word one byte
  tell: (verb: string, ...words: string[]) => void // needs no answer
  close: () => void // ends the agent's input; it winds up by itself
  child: Killable
  greeting: Promise<ReadonlySet<string>> // what is over there
}>

type Killable = Readonly<{ kill: (signal: NodeJS.Signals) => void; onCtrlC?: "goes on" }>

/** Everything that one run on one host needs. */
type Context = {
  readonly plan: Plan
  readonly env: Env
  readonly run: string // names this run over there
  readonly report: Report
  readonly steps: Steps
  readonly writeReport: () => void
  readonly control: string // path of the multiplexing socket, "" without
  readonly children: Set<Killable>
  readonly ear: Ear // for what the command says
  multiplexed: boolean
  noisy: boolean // the login shell prints something of its own
  roundTrip: number // milliseconds, as the first answer suggests
  channel?: Promise<number> // of the command: ends with its ssh
  rsync?: Promise<string> // first line of what rsync here says of itself
  session?: Session
  running: boolean
  started: boolean // the command, over there
  ran?: "to its end" | "interrupted since" // the command
  keyboard?: Keyboard // while the command runs, if it is a terminal
  suspend?: () => void // what Ctrl-Z at the terminal over there leads to
  signal?: NodeJS.Signals // that this program got first
}

/** Opens the connection (asking for a password once), then the agent. */
async function connect(context: Context): Promise<void> {
  const release = context.steps.hold("until bytes flow") // ssh may ask for a password on the terminal
  context.multiplexed = await openMaster(context)
  context.session = await openSession(context)
  if (context.multiplexed) void context.session.greeting.then(release, () => undefined)
  // The agent lists known trees while they are scanned here.
  for (const tree of context.plan.trees)
    if (fs.existsSync(manifestFile(context, tree))) context.session.tell("look", tree.id)
}

/** How much the agent may say in one answer: some 100 bytes for each file that the command changed. */
const ANSWER_LIMIT = 2 ** 28

/** Requests whose answers are still to come, in their order; once it has ended every request fails. */
type Pending = { lines: string[]; resolve: (lines: string[]) => void; reject: (error: Error) => void }
type Queue = { readonly waiting: Pending[]; ended?: Error }

function endQueue(queue: Queue, error: Error): void {
  queue.ended ??= error
  for (const { reject } of queue.waiting.splice(0)) reject(queue.ended)
}

/** Starts the agent; its greeting comes later. Whatever the login shell prints before it is passed over. */
async function openSession(context: Context): Promise<Session> {
  const { plan } = context
  const child = await start(context, [...sshArguments(context), BOOT_LINE], { detached: context.multiplexed })
  const queue: Queue = { waiting: [] }
  child.onOutput(answerReader(context, { child, queue }))
  void child.ended.then((code) => endQueue(queue, lostConnection(context, code, child.errors())))
  const send = (words: readonly string[]) => child.write(`${words.join(" ")}\n`)
  const request = (words: readonly string[], told = () => words.slice(1)) =>
    new Promise<string[]>((resolve, reject) => {
      if (queue.ended) return reject(queue.ended)
      const asked = performance.now()
      const answered = (answer: string[]) => {
        const what = words.slice(0, 2).filter((word) => !word.includes("\\")) // no scripts and contents
        publishCommand([AGENT, ...what], performance.now() - asked)
        resolve(answer)
      }
      queue.waiting.push({ lines: [], resolve: answered, reject })
      if (plan.options.verbosity > 1)
        context.steps.say(`> ${[words[0]!, ...told()].map(shortened).join(" ")}`)
      send(words)
    })
  const encode = (words: readonly string[], encoding: "utf8" | "latin1") =>
    words.map((word) => encodeWord(word, encoding))
  const ask: Session["ask"] = (verb, ...words) =>
    request([verb, ...encode(words, "utf8")], () =>
      encode(words.map(withoutSecret), "utf8").map(secretLeftOut),
    )
  const began = performance.now()
  send([encodeScript(AGENT_SCRIPT)])
  const greeting = ask("hello", plan.root, plan.host.directory, context.run).then((answer) => {
    context.roundTrip = (performance.now() - began) / 3
    context.noisy = answer.some((line) => line !== "" && !line.startsWith("f "))
    return new Set(answer.filter((line) => line.startsWith("f ")).map((line) => line.slice(2)))
  })
  greeting.catch(() => undefined)
  return {
    child: child.handle,
    ask,
    askBytes: (verb, ...words) => request([verb, ...encode(words, "latin1")]),
    tell: (verb, ...words) => void (queue.ended ?? send([verb, ...encode(words, "utf8")])),
    close: () => child.letGo(),
    greeting,
  }
}

/** Takes what the agent prints: data lines for the first request that waits, `.ok` or `.fail WHY` at the end of each. */
function answerReader(context: Context, from: { child: Child; queue: Queue }): (chunk: string) => void {
  const { child, queue } = from
  const { host, options } = context.plan
  let rest = ""
  let received = 0
  let first: EdictError | undefined // what later requests fail for, too
  const take = (line: string) => {
    if (options.verbosity > 1) context.steps.say(`< ${shown(line)}`)
    if (line.startsWith(".")) received = 0
    if (line === ".started") {
      context.started = true
      return context.keyboard?.use()
    }
    if (line === ".stopped") return context.suspend?.()
    if (line === ".ok") {
      const answered = queue.waiting.shift()
      answered?.resolve(answered.lines)
    } else if (line === ".fail unexpected") queue.waiting.shift()?.reject(new Unexpected(line))
    else if (line.startsWith(".fail ")) {
      const error = new EdictError(`${host.name}: ${shown(line.slice(6))}${because(child.errors())}`)
      const repeated = line === ".fail an earlier step failed"
      if (!repeated) first ??= error
      queue.waiting.shift()?.reject(repeated ? (first ?? error) : error)
    } else queue.waiting[0]?.lines.push(line)
  }
  return (chunk) => {
    received += chunk.length
    if (received > ANSWER_LIMIT) {
      endQueue(
        queue,
        new EdictError(`${host.name} answers without an end: more than ${ANSWER_LIMIT >> 20} MiB`),
      )
      return child.handle.kill("SIGKILL")
    }
    const parts = chunk.includes("\n") ? (rest + chunk).split("\n") : [rest + chunk]
    rest = parts.pop()!
    parts.forEach(take)
  }
}

/** What it means that the agent's ssh ended. */
function lostConnection(context: Context, code: number, errors: string): EdictError {
  const { plan, roundTrip, running } = context
  if (code === 255 && roundTrip === 0) return sshError(plan.host, errors)
  const hint = running ? "the same again: what the command changed until then comes home first" : ""
  return new EdictError(`the connection to ${plan.host.name} was lost${because(errors)}`, hint, SSH_FAILED)
}

// ── 17. Ssh: one connection, and what its failures mean ─────────────────────────────────────────────────

/** What it takes to reach a host: the host, and the socket of the shared connection or "". */
type Reach = Readonly<{ plan: Pick<Plan, "host">; control: string; noisy: boolean }>

/** The ssh program with all options but the host, for rsync -e. */
function sshProgram(context: Reach): string[] {
  const control =
    context.control === ""
      ? ["-o", "ControlMaster=no", "-o", "ControlPath=none"]
      : ["-o", "ControlMaster=no", "-o", `ControlPath=${context.control}`]
  return ["ssh", ...control, "-o", "RequestTTY=no", ...context.plan.host.sshOptions]
}

/** ssh up to the host, for edict's own talk; the remote line follows. */
function sshArguments(context: Reach): string[] {
  const argv = [...sshProgram(context), "-T", "--", context.plan.host.destination]
  return context.noisy ? [...pastNoise(argv), `${BEGIN};`] : argv
}

/** The same for the command; with a terminal, ssh must not say at the end that it closes the connection. */
function commandArguments(context: Reach, terminal: "-tt" | "-T"): string[] {
  const options = sshProgram(context).filter(
    (word, at, all) => terminal === "-T" || (word !== "RequestTTY=no" && all[at + 1] !== "RequestTTY=no"),
  )
  const quiet = terminal === "-tt" ? ["-o", "LogLevel=ERROR"] : []
  return [...options, ...quiet, terminal, "--", context.plan.host.destination]
}

/** Where a login shell prints something of its own, edict's talk begins behind this line. */
const BEGIN = "echo; echo edict-begins"

/** ssh, with what comes before that line passed over. */
const pastNoise = (ssh: readonly string[]): string[] => [
  "bash",
  "-c",
  'set -o pipefail; "$@" | { while IFS= read -r line; do [ "$line" != edict-begins ] || exec cat; done; }',
  "bash",
  ...ssh,
]

/**
 * A socket path short enough everywhere (104 bytes on macOS, of which ssh wants 17 for its own suffix), in a
 * directory that only this user can enter; "" where none can be had.
 */
function controlPath(plan: Pick<Plan, "host">, env: Env): string {
  const parent =
    env.XDG_RUNTIME_DIR && env.XDG_RUNTIME_DIR.length < 40 && canWrite(env.XDG_RUNTIME_DIR)
      ? env.XDG_RUNTIME_DIR
      : "/tmp"
  const directory = `${parent}/edict-${process.getuid?.() ?? 0}`
  try {
    fs.mkdirSync(directory, { recursive: true, mode: 0o700 })
    const stat = fs.lstatSync(directory)
    if (!stat.isDirectory() || stat.uid !== process.getuid?.() || (stat.mode & 0o077) !== 0) return ""
  } catch {
    return ""
  }
  // A connection lends the agent that it was opened with.
  const agent = plan.host.sshOptions.includes("-A") ? ` ${env.SSH_AUTH_SOCK}` : ""
  return `${directory}/${hash(`${plan.host.destination} ${plan.host.sshOptions.join(" ")}${agent}`).slice(0, 16)}`
}

/** Writes the host key of the machines file where ssh looks for it. */
function saveHostKey({ knownHosts }: Host): void {
  if (knownHosts === undefined) return
  fs.mkdirSync(path.dirname(knownHosts.file), { recursive: true, mode: 0o700 })
  replaceFile(path.dirname(knownHosts.file), path.basename(knownHosts.file), knownHosts.line)
}

/** Opens the shared connection if none is open; answers whether there is one. Throws what ssh says if it fails. */
async function openMaster(context: Context): Promise<boolean> {
  const { control, plan } = context
  saveHostKey(plan.host)
  if (control === "") return false
  const to = [...plan.host.sshOptions, "-o", `ControlPath=${control}`]
  const isOpen = async () =>
    fs.existsSync(control) && (await succeeds(["ssh", ...to, "-O", "check", "--", plan.host.destination]))
  if (await isOpen()) return true
  const locks = await lockSoon(`${control}.lock`) // of two that open it at once, ssh would leave one behind for good
  try {
    if (await isOpen()) return true
    fs.rmSync(control, { force: true }) // its connection was killed
    await startMaster(context, to)
    return fs.existsSync(control)
  } finally {
    for (const lock of locks) fs.closeSync(lock)
  }
}

async function startMaster(context: Context, to: readonly string[]): Promise<void> {
  const { plan } = context
  const argv = [
    "ssh",
    ...(await livelinessOptions(plan.host)),
    "-o",
    "ControlMaster=yes",
    "-o",
    "ControlPersist=60",
    "-o",
    "RequestTTY=no",
    ...to,
    "-T",
    "-f",
    "-N",
    "--",
    plan.host.destination,
  ]
  await execute(context, argv, {
    what: "ssh",
    stdin: "inherit",
    failure: (code, errors) => (code === 255 ? sshError(plan.host, errors) : undefined),
  })
}

/** Time limits where the user's own ssh configuration sets none: a dead host or network must not hang for minutes. */
async function livelinessOptions(host: Host): Promise<string[]> {
  const settings = await capture(["ssh", "-G", ...host.sshOptions, "--", host.destination], "may-fail")
  const unset = (name: string, value: string) =>
    !settings.includes(`${name} `) || settings.includes(`\n${name} ${value}\n`)
  return [
    ...(unset("connecttimeout", "none") ? ["-o", "ConnectTimeout=10"] : []),
    ...(unset("serveraliveinterval", "0")
      ? ["-o", "ServerAliveInterval=5", "-o", "ServerAliveCountMax=3"]
      : []),
  ]
}

/** ssh's own words as an error, with what usually helps. */
export function sshError(host: KnownHost, errors: string): EdictError {
  const [known] = explain(errors, { by: "ssh", host })
  const line = known?.line ?? (lastLine(errors) || "ssh failed")
  const remedy = known?.remedy ?? `ssh -v ${host.destination} true`
  return new EdictError(`cannot reach ${shown(host.name)}: ${shown(line)}`, remedy, SSH_FAILED)
}
// ── 18. Processes: the only place that starts one ───────────────────────────────────────────────────────
// zx starts them and reads short answers; bytes flow inside one bash pipeline or through inherited streams.

/** zx with everything that the environment's ZX_* could change set; loaded late, as it is most of the start-up. */
async function shell(): Promise<typeof import("zx/core").$> {
  const { $, useBash } = await load("zx", () => import("zx/core"), "/core")
  try {
    useBash()
  } catch {
    throw new EdictError("no bash on PATH", "install bash")
  }
  return $({
    verbose: false,
    quiet: true,
    nothrow: true,
    prefix: "",
    postfix: "",
    preferLocal: false,
    timeout: undefined,
    detached: false,
    env: cleanEnvironment(),
    delimiter: undefined,
    cwd: undefined,
  })
}

/** The environment without variables of git that would point it elsewhere; messages of tools in English. */
function cleanEnvironment(): NodeJS.ProcessEnv {
  const dropped =
    /^(GIT_(DIR|WORK_TREE|INDEX_FILE|OBJECT_DIRECTORY|ALTERNATE_OBJECT_DIRECTORIES|COMMON_DIR|PREFIX|NAMESPACE|CEILING_DIRECTORIES)|ZX_.*|RSYNC_.*)$/
  return Object.fromEntries(Object.entries(process.env).filter(([name]) => !dropped.test(name)))
}

/** Several commands as one bash pipeline that fails if one of them does: with 255, as ssh, before all else. */
const pipeline = (...stages: string[][]): string[] => [
  "bash",
  "-c",
  `set -o pipefail; ${stages.map((argv) => argv.map(shellQuote).join(" ")).join(" | ")}
  codes=($? "\${PIPESTATUS[@]}"); [[ " \${codes[*]} " == *" 255 "* ]] && exit 255; exit "\${codes[0]}"`,
]

/** A remote command that takes its script, and words for it, from its first lines, and then standard input as it comes. */
const withScript = (ssh: string[], script: string, ...words: string[]): string[] => [
  "bash",
  "-c",
  `{ printf '%s\\n' "$1"; cat; } | "\${@:2}"`,
  "bash",
  [encodeScript(script), ...words].join("\n"),
  ...ssh,
  BOOT_LINE,
]

/**
 * Runs a local command and answers its stdout, each byte one character. Throws EdictError if it fails, unless it
 * may; then the answer is what it printed before.
 */
async function capture(
  argv: readonly string[],
  failure: "may-fail" | "throws" = "throws",
  input?: Buffer,
): Promise<string> {
  const how = { what: argv[0]!, onCtrlC: "goes on" } as const
  const result = await collect(argv, { ...how, input, stdin: input ? "pipe" : "ignore" })
  if (result.code !== 0 && failure === "throws") throw commandError(argv, argv[0]!, result)
  return result.code === 127 && failure === "may-fail" ? "" : result.stdout
}

const succeeds = async (argv: readonly string[]): Promise<boolean> =>
  (await collect(argv, { stdin: "ignore", what: argv[0]! })).code === 0

type Execution = Readonly<{
  onErrors?: (chunk: string) => void // sees stderr as it comes
  onOutput?: (chunk: string) => void // and stdout
  what: string
  input?: Buffer
  stdin?: "ignore" | "inherit" | "pipe"
  failure?: (code: number, errors: string) => EdictError | undefined
  onCtrlC?: "goes on" // what brings changes home; a second one ends it
}>

/** Runs one step of the plan: traced, killed with this program, its failure explained. Answers its stdout. */
async function execute(context: Context, argv: readonly string[], how: Execution): Promise<string> {
  const result = await collect(argv, { ...how, stdin: how.input ? "pipe" : (how.stdin ?? "ignore"), context })
  if (result.code !== 0)
    throw how.failure?.(result.code, result.stderr) ?? commandError(argv, how.what, result, context.plan.host)
  return result.stdout
}

async function collect(
  argv: readonly string[],
  how: Execution & { context?: Context },
): Promise<{ code: number; stdout: string; stderr: string }> {
  const began = performance.now()
  const $ = await shell()
  // Of a session of its own it does not get what the terminal sends, and cannot be asked for a password.
  const detached = how.onCtrlC === "goes on" && how.context?.multiplexed !== false
  const stdio = [how.stdin ?? "ignore", "pipe", "pipe"] as const
  const process_ = $({ stdio: [...stdio], input: how.input, detached })`${[...argv]}`
  if (how.input) process_.stdin.on("error", () => undefined) // it ended before it read all
  const [stdout, stderr]: [Buffer[], Buffer[]] = [[], []]
  process_.stdout.on("data", (chunk: Buffer) => {
    stdout.push(chunk)
    how.onOutput?.(chunk.toString("utf8"))
  })
  process_.stderr.on("data", (chunk: Buffer) => {
    stderr.push(chunk)
    how.onErrors?.(chunk.toString("utf8"))
  })
  const { onCtrlC } = how
  const kill = (signal: NodeJS.Signals) => {
    killWithChildren(process_.pid, signal)
    // ssh's shared connection may hold the other ends for as long as something runs over there.
    process_.stdout.destroy()
    process_.stderr.destroy()
  }
  const child = { kill, onCtrlC }
  how.context?.children.add(child)
  const result = await process_
  how.context?.children.delete(child)
  publishCommand(argv, performance.now() - began)
  return {
    code: exitCodeOf(result),
    stdout: Buffer.concat(stdout).toString("latin1"),
    stderr: Buffer.concat(stderr).toString("utf8"),
  }
}

type Foreground = Readonly<{
  detached: boolean
  keys: Keys | "none"
  listenTo: "nothing" | "stdout" | "stderr"
}>

/**
 * Starts a command with our own standard streams. The one that is listened to goes through tee, which writes each byte
 * as it comes; the lines that hold a mark come to this program, too, by grep, which may use so much memory, no more.
 * The streams are the command's ssh's: what the command has over there, a terminal or none, is the same as without.
 */
function startListened(
  $: Awaited<ReturnType<typeof shell>>,
  { env, ear }: Context,
  { argv, detached, listenTo, stdin }: Foreground & { argv: readonly string[]; stdin: Keyboard["stdin"] },
): { process_: ProcessPromise; heard: Promise<unknown> } {
  const words = [...argv]
  const hasTools = ["tee", "tr", "grep"].every((tool) => hasProgram(tool, env))
  if (listenTo === "nothing" || !hasTools)
    return {
      process_: $({ stdio: [stdin, "inherit", "inherit"], detached })`exec ${words}`,
      heard: Promise.resolve(),
    }
  const marks = TROUBLE_MARKS.flatMap((mark) => ["-e", mark])
  process.stderr.write("") // now, not later: Bun lets its streams never block, and what it starts unblocks them
  // 3 is this program's ear, 4 the stream itself. No signal but the end of the stream ends those who listen.
  const $listened = $({ stdio: [stdin, "inherit", "inherit", "pipe"], detached })
  const process_ =
    listenTo === "stderr"
      ? $listened`exec 4>&2 2> >(trap '' INT QUIT TERM HUP TSTP; exec 2>/dev/null
          LC_ALL=C exec tee >(exec 4>&-; ulimit -v 400000; grep -aF ${marks} >&3; [ $? -lt 2 ] || exec cat >/dev/null) 3>&- >&4)
          exec ${words} 3>&- 4>&-`
      : $listened`exec 4>&1 > >(trap '' INT QUIT TERM HUP TSTP; exec 2>/dev/null
          LC_ALL=C exec tee >(exec 4>&-; ulimit -v 400000; tr '\\r' '\\n' | grep -aF ${marks} >&3; [ $? -lt 2 ] || exec cat >/dev/null) 3>&- >&4)
          exec ${words} 3>&- 4>&-`
  const listening = process_.child!.stdio[3] as Readable
  listening.on("data", (chunk: Buffer) => ear.hear(chunk.toString("utf8")))
  return { process_, heard: new Promise((resolve) => listening.once("close", resolve)) }
}

/** Runs a command with our own standard streams; answers its exit code. */
async function foreground(context: Context, argv: readonly string[], how: Foreground): Promise<number> {
  const began = performance.now()
  const keyboard = how.keys === "none" ? undefined : await openKeyboard(how.keys)
  const { process_, heard } = startListened(await shell(), context, {
    argv,
    ...how,
    detached: how.detached && (how.keys !== "each" || keyboard !== undefined), // or it hears of no new size
    stdin: keyboard?.stdin ?? "inherit",
  })
  const end = context.plan.monitor === "none" ? kill : killWithChildren
  const child = { kill: (signal: NodeJS.Signals) => end(process_.pid, signal) }
  context.children.add(child)
  context.keyboard = keyboard
  keyboard?.attach(process_)
  if (how.keys === "lines" || context.started) keyboard?.use()
  const result = await process_
  keyboard?.close()
  context.keyboard = undefined
  context.children.delete(child)
  await Promise.race([heard, delay(5000)]) // what it said last is on its way through tee
  publishCommand(argv, performance.now() - began)
  return exitCodeOf(result)
}

/** What the command gets of the keyboard: lines, as the terminal edits them, or each key, for a terminal over there. */
type Keys = "lines" | "each"

/**
 * Our terminal as the input of a command. What ssh has as its standard input is read by the process of the shared
 * connection, which belongs to no job of the user's shell: it would go on reading while this program is stopped or in
 * the background, and swallow what is typed for the shell. So a process of ours reads, and only while that is right.
 */
type Keyboard = Readonly<{
  stdin: "inherit" | "pipe" | number // of the command
  attach: (process_: ProcessPromise) => void // the command
  use: () => void // reads from now on, or as soon as this program is in the foreground
  leave: () => void // reads no more, and the terminal is as it was
  close: () => void
}>

/**
 * Reads the terminal as a job of the shell does: a background one gets an error. The guard, whose input 3 ends without a
 * line when this program was killed, then ends the reader and gives the terminal its modes ($1) back.
 */
export const KEYBOARD_SCRIPT = sh`
trap '' INT QUIT TTIN
exec 4<&0
( IFS= read -r _ <&3 || { kill "$$"; [ -z "$1" ] || stty "$1" <&4; }; ) >/dev/null 2>&1 &
exec cat 2>/dev/null 3<&- 4<&-
`

/** Answers undefined where ssh has to read the terminal itself. */
async function openKeyboard(keys: Keys): Promise<Keyboard | undefined> {
  if (keys === "lines") {
    const command: { stdin?: NodeJS.WritableStream } = {}
    const reader = keyReader("", (typed) => void (typed ? command.stdin?.write(typed) : command.stdin?.end()))
    const attach = (process_: ProcessPromise) => {
      command.stdin = process_.stdin
      process_.stdin.on("error", () => undefined) // it ended
    }
    return { stdin: "pipe", attach, close: reader.leave, ...reader }
  }
  const modes = sttyHere("-g")
  const pseudo = await openPseudoTerminal(modes)
  if (pseudo === undefined) return undefined
  let command: ProcessPromise | undefined
  const follow = () => {
    pseudo.terminal.resize(...windowSize())
    kill(command?.pid, "SIGWINCH")
  }
  const reader = keyReader(modes, (typed) => void (typed && pseudo.terminal.write(typed)))
  process.on("SIGWINCH", follow)
  return {
    stdin: pseudo.slave,
    attach: (process_) => void (command = process_),
    use: () => {
      follow()
      reader.use()
    },
    leave: reader.leave,
    close: () => {
      process.off("SIGWINCH", follow)
      reader.leave()
      fs.closeSync(pseudo.slave)
      pseudo.terminal.close()
    },
  }
}

/**
 * A terminal of our own with the modes and the size of the real one: ssh takes both from its input for the terminal
 * over there. What is typed goes in at its other end; nothing comes out, as ssh's output is the real one.
 */
async function openPseudoTerminal(
  modes: string,
): Promise<{ terminal: Bun.Terminal; slave: number } | undefined> {
  const [cols, rows] = windowSize()
  if (typeof Bun.Terminal !== "function") return undefined // Bun before 1.3.5
  let said = ""
  const data = (_: Bun.Terminal, bytes: Uint8Array) => void (said += Buffer.from(bytes).toString("latin1"))
  const terminal = new Bun.Terminal({ cols, rows, data })
  const name = () => /^\/dev\/[\w/]+(?=\s)/m.exec(said)?.[0]
  await Bun.spawn(["sh", "-c", 'stty "$1"; tty', "sh", modes], { terminal }).exited
  for (let n = 0; n < 200 && !name(); n++) await delay(5)
  try {
    return { terminal, slave: fs.openSync(name() ?? "", fs.constants.O_RDWR | fs.constants.O_NOCTTY) }
  } catch {
    terminal.close() // no pseudo-terminals below /dev here
    return undefined
  }
}

/** Reads our terminal while it may; `take` gets the bytes, and nothing at the end of input. With `modes`, each key. */
function keyReader(
  modes: string,
  take: (typed: Uint8Array | undefined) => void,
): Pick<Keyboard, "use" | "leave"> {
  let reader: ReturnType<typeof startReader> | undefined
  let later: ReturnType<typeof setTimeout> | undefined
  const setModes = (...words: string[]) => (modes === "" ? "" : sttyHere(...words))
  const leave = () => {
    clearTimeout(later)
    process.off("exit", leave)
    if (reader === undefined) return
    const { end } = reader
    reader = undefined
    end()
    setModes(modes)
  }
  const use = () => {
    clearTimeout(later)
    if (reader !== undefined) return
    if (!isInForeground()) return void (later = setTimeout(use, 300))
    setModes("raw", "-echo", "-iexten")
    const mine = (reader = startReader(modes))
    process.on("exit", leave)
    void mine.read(take).then((end) => {
      if (reader !== mine) return
      reader = undefined
      if (end === "end of input") take(undefined)
      else later = setTimeout(use, 300) // in the background
    })
  }
  return { use, leave }
}

function startReader(modes: string) {
  const child = Bun.spawn(["sh", "-c", KEYBOARD_SCRIPT, "sh", modes], {
    stdio: ["inherit", "pipe", "inherit", "pipe"],
    env: cleanEnvironment(),
  })
  const read = async (take: (typed: Uint8Array) => void): Promise<"end of input" | "ended"> => {
    for await (const typed of child.stdout) take(typed)
    return (await child.exited) === 0 ? "end of input" : "ended"
  }
  const end = () => {
    if (child.exitCode !== null || child.signalCode !== null) return // and the descriptor may be another file's
    try {
      fs.writeSync(Number(child.stdio[3]), "\n")
    } catch {
      // the guard has ended
    }
    child.kill("SIGKILL")
  }
  return { read, end }
}

/** Runs stty on our standard input; answers what it prints, "" if there is none. */
function sttyHere(...words: string[]): string {
  try {
    const { stdout } = Bun.spawnSync(["stty", ...words], { stdin: "inherit", stderr: "ignore" })
    return stdout.toString().trim()
  } catch {
    return ""
  }
}

/** Columns and rows of the terminal that is our standard input. */
function windowSize(): [columns: number, rows: number] {
  const [rows, columns] = sttyHere("size").split(" ").map(Number)
  return [columns || 80, rows || 24]
}

/** Whether the shell that started this program, if it has job control, gave it the terminal. */
function isInForeground(): boolean {
  const stat = readText("/proc/self/stat")?.replace(/^.*\) \S+ /s, "") // ppid pgrp session tty_nr tpgid …
  const ps = () => Bun.spawnSync(["ps", "-o", "ppid=,pgid=,sess=,tty=,tpgid=", "-p", String(process.pid)])
  const [, group, , terminal, foreground] = (stat ?? ps().stdout.toString()).trim().split(/\s+/)
  return group === foreground || terminal === "0" || terminal?.startsWith("?") === true
}

type Child = Readonly<{
  handle: Killable
  write: (text: string) => void
  letGo: () => void // ends its input, and this program does not wait for it any more
  onOutput: (take: (chunk: string) => void) => void
  errors: () => string
  ended: Promise<number>
}>

/** Starts a long-lived command that is talked to; detached ones do not get the terminal's Ctrl-C. */
async function start(context: Context, argv: readonly string[], how: { detached: boolean }): Promise<Child> {
  const $ = await shell()
  const process_ = $({ stdio: ["pipe", "pipe", "pipe"], detached: how.detached })`exec ${[...argv]}`
  const stderr: Buffer[] = []
  process_.stderr.on("data", (chunk: Buffer) => stderr.push(chunk))
  process_.stdin.on("error", () => undefined)
  const child = { kill: (signal: NodeJS.Signals) => kill(process_.pid, signal) }
  context.children.add(child)
  const end = async () => {
    const result = await process_
    context.children.delete(child)
    return exitCodeOf(result)
  }
  const ended = end()
  publishCommand(argv)
  return {
    handle: child,
    write: (text) => void process_.stdin.write(Buffer.from(text, "latin1")),
    letGo: () => {
      process_.stdin.end()
      process_.child?.unref()
      for (const stream of [process_.stdout, process_.stderr])
        (stream as unknown as { unref?: () => void }).unref?.()
    },
    onOutput: (take) => void process_.stdout.on("data", (chunk: Buffer) => take(chunk.toString("latin1"))),
    errors: () => Buffer.concat(stderr).toString("utf8"),
    ended,
  }
}

function kill(pid: number | undefined, signal: NodeJS.Signals): void {
  try {
    if (pid !== undefined) process.kill(pid, signal)
  } catch {
    // it has ended
  }
}

/** The same, and the stages of a pipeline: bash does not pass a signal on. */
function killWithChildren(pid: number | undefined, signal: NodeJS.Signals): void {
  try {
    if (pid !== undefined) Bun.spawnSync(["pkill", `-${signal.slice(3)}`, "-P", String(pid)])
  } catch {
    // no pkill: they end at their next write
  }
  kill(pid, signal)
}

/** 128+n for a process that signal n ended, as shells say it. */
export function exitCodeOf(result: { exitCode: number | null; signal: NodeJS.Signals | null }): number {
  return result.exitCode ?? 128 + (result.signal ? os.constants.signals[result.signal] : 0)
}

/** What dd says of its counting, which is no error. */
const COUNTER_LINES = /^(\d+\+\d+ records (in|out)|\d+ bytes .*copied.*)$/gm

/** What a failed step means, in one line, with what to do about the usual causes: see TROUBLES. */
function commandError(
  argv: readonly string[],
  what: string,
  result: { code: number; stderr: string },
  host?: Host,
): EdictError {
  const errors = result.stderr.replaceAll("\r", "\n").replace(COUNTER_LINES, "")
  const where = host === undefined || what.startsWith("retrieval") ? "here" : "here or there"
  const scene = { by: "step", host, where: what.startsWith("upload") ? "there" : where } as const
  const [known] = explain(errors, scene)
  const absent = /^bash: line \d+: (\S+): command not found$/m.exec(errors)?.[1]
  if (absent) return new EdictError(`no ${shown(absent)} here`, `install ${shown(absent)}`)
  if (result.code === 127) return new EdictError(`no ${shown(argv[0]!)} here`, `install ${shown(argv[0]!)}`)
  const isCut = argv[0] === "rsync" && /connection unexpectedly closed|error \(code 255\)/.test(errors)
  if (host && isCut && !/No space left|Disk quota|^ssh: /m.test(errors))
    return new EdictError(
      `the connection to ${host.name} was lost during the ${what}`,
      "run it again",
      SSH_FAILED,
    )
  if (host && result.code === 255) return sshError(host, result.stderr)
  const line = known?.line ?? lines(errors).find((text) => text.startsWith("error: ")) ?? firstLine(errors)
  return new EdictError(
    `${what} failed (exit ${result.code})${line ? `: ${shown(line.trim())}` : ""}`,
    known?.remedy ?? (host ? "add -v to see the commands" : ""),
  )
}

/**
 * What this process does on a signal: the command gets it, and its changes still come home; the second time it leaves
 * at once. After the command, the first Ctrl-C ends only the transfer of results. Ctrl-Z stops the command, too, and fg
 * lets it go on.
 */
function handleSignals(context: Context): { dispose: () => void } {
  let first = 0
  let show = () => {}
  const end = (signal: NodeJS.Signals) => () => {
    const isFirst = context.signal === undefined
    // One of several hosts: Ctrl-C comes from the terminal, and once more from the process that runs them all.
    if (!isFirst && context.env[PARENT] && performance.now() - first < 500) return
    if (isFirst) first = performance.now()
    context.signal ??= signal
    context.report.signal ??= signal
    if (context.running && isFirst) return context.session?.tell("signal", signal.slice(3))
    if (context.ran && isFirst && signal === "SIGINT") {
      context.ran = "interrupted since"
      for (const child of context.children)
        if (child !== context.session?.child && child.onCtrlC !== "goes on") child.kill("SIGTERM")
      return
    }
    for (const child of context.children) child.kill("SIGTERM")
    context.report.exitCode = signalCode(signal)
    context.steps.end()
    context.writeReport()
    process.exit(signalCode(signal))
  }
  // As the shell's job control has it: a process group that no shell could continue is not stopped.
  const stop = (whom: "this process" | "its group") => {
    context.keyboard?.leave()
    show()
    show = context.steps.hold("always")
    process.off("SIGTSTP", pause)
    process.kill(whom === "its group" ? 0 : process.pid, "SIGTSTP")
    process.on("SIGTSTP", pause)
    resume()
  }
  const pause = () => {
    if (context.running) context.session?.tell("pause")
    // A terminal over there tells when the command has stopped; else we wait until the request is on its way.
    if (!context.started || typeof context.keyboard?.stdin !== "number")
      setTimeout(() => stop("this process"), 100)
  }
  const resume = () => {
    show()
    if (!context.running) return
    context.keyboard?.use()
    context.session?.tell("resume")
  }
  context.suspend = () => {
    if (typeof context.keyboard?.stdin === "number") stop("its group") // else there is no Ctrl-Z over there
  }
  const handlers: [NodeJS.Signals, () => void][] = [
    ["SIGINT", end("SIGINT")],
    ["SIGTERM", end("SIGTERM")],
    ["SIGHUP", end("SIGHUP")],
    ["SIGTSTP", pause],
    ["SIGCONT", resume],
  ]
  for (const [signal, handler] of handlers) process.on(signal, handler)
  return { dispose: () => handlers.forEach(([signal, handler]) => process.off(signal, handler)) }
}

/** 128+n, as shells say it of a process that a signal ended. */
const signalCode = (signal: NodeJS.Signals): number => 128 + os.constants.signals[signal]

/** The stages that a line on the terminal tells of: while others run, ssh or the command may be writing there. */
const STAGES_SHOWN = new Map<string, (host: string) => string>([
  ["scan", () => "scan"],
  ["upload", (host) => `upload to ${host}`],
  ["results", (host) => `results from ${host}`],
  ["sync back", (host) => `sync back from ${host}`],
])

/** Runs one stage and notes its time. */
async function stage<T>(context: Context, name: string, work: () => Promise<T>): Promise<T> {
  const began = performance.now()
  const { steps, plan, report } = context
  const label = STAGES_SHOWN.get(name)?.(shown(plan.host.name))
  const done = label === undefined ? () => undefined : steps.begin(label)
  try {
    return await work()
  } finally {
    done()
    const milliseconds = Math.round(performance.now() - began)
    report.stages.push({ stage: name, milliseconds })
    if (plan.options.verbosity > 0) steps.say(`${name}: ${(milliseconds / 1000).toFixed(2)} s`)
  }
}

/** Waits for all of these; answers the first error that a user can mend, and tells the others. */
async function firstTrouble(
  { steps }: Context,
  work: readonly Promise<void>[],
): Promise<EdictError | undefined> {
  const errors = (await Promise.allSettled(work)).flatMap((result) =>
    result.status === "rejected" ? [mendable(result.reason)] : [],
  )
  const bug = errors.find((error) => !(error instanceof EdictError))
  if (bug !== undefined) throw bug
  for (const error of errors.slice(1)) tell(error, steps)
  return errors[0] as EdictError | undefined
}

async function startContext(plan: Plan, { env, steps, reporter }: Here): Promise<Context> {
  const carrier = hasProgram("tar", env) ? "tar" : "rsync" // either will do
  for (const tool of plan.trees.length > 0 ? ["bash", "ssh", carrier] : ["bash", "ssh"])
    if (!hasProgram(tool, env)) throw new EdictError(`no ${tool} here`, `install ${tool}`)
  if (plan.monitor === "nom" && !hasProgram("nom", env))
    throw new EdictError(
      "no nom here to show the log",
      "nix profile install nixpkgs#nix-output-monitor   # or say nix instead of nom",
    )
  if (plan.trees.some((tree) => tree.kind === "git") && !hasProgram("git", env))
    throw new EdictError("no git here, and the flake lies in a git repository", "install git")
  return {
    plan,
    env,
    run: randomName().slice(0, 16),
    report: reporter.report,
    steps,
    writeReport: reporter.write,
    control: controlPath(plan, env),
    children: new Set(),
    ear: openEar(),
    multiplexed: false,
    noisy: false,
    roundTrip: 0,
    running: false,
    started: false,
  }
}

async function endContext(context: Context): Promise<void> {
  for (const child of context.children) if (child !== context.session?.child) child.kill("SIGTERM")
  context.session?.close()
  context.steps.end()
}
// ── 19. Many hosts: the same command on several at once ─────────────────────────────────────────────────
// Each host gets a process of its own, so that a dead or slow one stands in nobody's way. What they print is put
// together line by line: here, and only here, the command's output passes through this program.

export type HostRun = Readonly<{
  host: Host
  state: "ended" | "stopped" | "not run" // stopped: by --fail-fast
  code: number
  seconds: number
  report: Partial<Report>
}>

/** Runs the command on all hosts at once (at most --jobs at a time); answers the highest exit code. */
async function runOnMany(
  invocation: Invocation,
  hosts: readonly Host[],
  how: { argv: readonly string[]; reporter: Reporter },
): Promise<number> {
  const { options } = invocation
  const { argv, reporter } = how
  const reports = fs.mkdtempSync(path.join(os.tmpdir(), "edict-reports-"))
  const removeReports = () => fs.rmSync(reports, { recursive: true, force: true })
  process.on("exit", removeReports)
  const queue = [...hosts]
  const children = new Set<Killable>()
  const stopped = new Set<Killable>()
  let signalled = 0
  const runs: HostRun[] = []
  const all = () =>
    hosts.map(
      (host): HostRun =>
        runs.find((run) => run.host === host) ?? { host, state: "not run", code: 0, seconds: 0, report: {} },
    )
  reporter.several = () => all().map(runAsJson)
  const stop = (signal: NodeJS.Signals) => {
    queue.length = 0
    for (const child of children) child.kill(signal)
  }
  const watch = relaySignals((signal) => {
    if (signalled > 0) reporter.write() // this is the second one, which ends the program
    signalled = signalCode(signal)
    stop(signal)
  })
  const put = lineWriter(() => stop("SIGTERM"))
  const worker = async () => {
    for (let host = queue.shift(); host; host = queue.shift()) {
      const report = path.join(reports, String(hosts.indexOf(host)))
      const words = wordsForOne(argv, invocation, { host, report })
      const run = await runOnOne({ host, words, report, hosts, children, stopped, put })
      runs.push(run)
      if (run.state === "stopped" || run.code === 0 || !options.failFast) continue
      for (const child of children) stopped.add(child)
      stop("SIGTERM")
    }
  }
  try {
    await Promise.all(Array.from({ length: Math.min(options.jobs, hosts.length) }, worker))
  } finally {
    watch.dispose()
    removeReports()
    process.off("exit", removeReports)
  }
  if (options.verbosity >= 0) await put(process.stderr, Buffer.from(hostTable(all())))
  const ended = all().filter(({ state }) => state === "ended")
  return Math.max(signalled, ...ended.map(({ code }) => code))
}

/** The report of one of several hosts: that of its own run, as far as there is one. */
function runAsJson({ host, state, code, seconds, report }: HostRun): Record<string, unknown> {
  return { ...report, host: host.name, state, exitCode: state === "not run" ? null : code, seconds }
}

/** The hosts without those that another one's name leads to, too: by ssh's own settings, with nobody contacted. */
async function withoutTwins(hosts: readonly Host[]): Promise<Host[]> {
  if (hosts.length < 2) return [...hosts]
  const places = await Promise.all(hosts.map(placeOf))
  return hosts.filter((_, at) => places.indexOf(places[at]!) === at)
}

/** Where ssh would go for a host: user, name and port, and the way there. */
async function placeOf({ sshOptions, destination }: Host): Promise<string> {
  const settings = lines(await capture(["ssh", "-G", ...sshOptions, "--", destination], "may-fail"))
  const place = settings.filter((line) =>
    /^(user|hostname|port|proxyjump|proxycommand|hostkeyalias) /.test(line),
  )
  return place.length > 0 ? place.sort().join("\n") : [destination, ...sshOptions].join(" ")
}

/** The words that make this program do one host's share. */
function wordsForOne(
  argv: readonly string[],
  invocation: Invocation,
  one: { host: Host; report: string },
): string[] {
  const { options, command } = invocation
  const own = splitOptions(argv)[0]
    .filter((word) => !/^--(jobs|report|link-suffix|materialize)=|^--(fail-fast|tty|no-tty)$/.test(word))
    .flatMap((word) => (/^-[opiFJ]=/.test(word) ? [word.slice(0, 2), word.slice(3)] : [word]))
  const name = one.host.name.replace(/[^A-Za-z0-9._-]+/g, "-")
  const more = ["--no-tty", `--report=${one.report}`, `--link-suffix=${options.linkSuffix}-${name}`]
  const files = options.materialize === undefined ? [] : [`--materialize=${options.materialize}/${name}`]
  return [...own, ...more, ...files, "--", one.host.name, ...command]
}

type OnOne = Readonly<{
  host: Host
  words: readonly string[]
  report: string
  hosts: readonly Host[]
  children: Set<Killable>
  stopped: ReadonlySet<Killable>
  put: PutLines
}>

/** One host's share: this same program, with the host named alone. */
async function runOnOne(one: OnOne): Promise<HostRun> {
  const { host, children, hosts, put } = one
  const began = performance.now()
  const child = Bun.spawn([...selfCommand(), ...one.words], {
    stdin: "ignore",
    stdout: "pipe",
    stderr: "pipe",
    env: { ...process.env, [PARENT]: String(process.pid) },
  })
  const handle: Killable = { kill: (signal) => child.kill(signal) }
  children.add(handle)
  const output = Promise.all([
    labelLines(child.stdout, process.stdout, { label: hostLabel(host, hosts, lookOf(1)), put }),
    labelLines(child.stderr, process.stderr, { label: hostLabel(host, hosts, lookOf(2)), put }),
  ])
  const code = await child.exited
  children.delete(handle)
  await Promise.race([output, delay(3000)]) // a process that it left behind may hold the streams
  const exitCode = child.signalCode ? signalCode(child.signalCode as NodeJS.Signals) : code
  return {
    host,
    state: one.stopped.has(handle) && exitCode === signalCode("SIGTERM") ? "stopped" : "ended",
    code: exitCode,
    seconds: (performance.now() - began) / 1000,
    report: JSON.parse(readText(one.report) || "{}") as Partial<Report>,
  }
}

/** Names the process that runs several hosts to those that do one host's share: they end when it does. */
const PARENT = "EDICT_PARENT"

/** Ends this process, as SIGTERM does, when the one that started it for one of several hosts is gone. */
function followParent(env: Env): void {
  const parent = env[PARENT]
  if (parent === undefined || parent !== String(process.ppid)) return
  const timer = setInterval(() => {
    if (String(process.ppid) === parent) return
    clearInterval(timer)
    process.kill(process.pid, "SIGTERM")
  }, 500)
  timer.unref()
}

/** How this program was started: the binary, or Bun and the script, with Bun's own options of the first line. */
function selfCommand(): string[] {
  const isCompiled = !/\.(ts|js)$/.test(Bun.main) || Bun.main.startsWith("/$bunfs/")
  return isCompiled ? [process.execPath] : [process.execPath, "--no-env-file", "--config=/dev/null", Bun.main]
}

const LABEL_COLOURS = [36, 33, 35, 32, 34, 96, 93, 95, 92, 94]

/** "name │ ", padded to the longest name; on a terminal in a colour that the host has in every run. */
export function hostLabel(
  host: Pick<Host, "name">,
  hosts: readonly Pick<Host, "name">[],
  look: "plain" | "coloured",
): string {
  const name = shown(host.name).padEnd(Math.max(...hosts.map((other) => shown(other.name).length)))
  if (look === "plain") return `${name} │ `
  return `\x1b[${coloursOf(hosts.map((other) => other.name)).get(host.name)}m${name} │\x1b[0m `
}

/** Colours by name; where two names of a run come to the same one, the next that is free. */
function coloursOf(names: readonly string[]): Map<string, number> {
  const colours = new Map<string, number>()
  for (const name of names.toSorted()) {
    const first = Number.parseInt(hash(name).slice(0, 8), 16)
    const wheel = LABEL_COLOURS.map((_, at) => LABEL_COLOURS[(first + at) % LABEL_COLOURS.length]!)
    colours.set(name, wheel.find((colour) => ![...colours.values()].includes(colour)) ?? wheel[0]!)
  }
  return colours
}

type PutLines = (to: NodeJS.WriteStream, whole: Buffer) => Promise<void>

/**
 * Writes whole lines, one after the other: two hosts, or the two streams of one terminal, never mix within a line.
 * Nobody reads faster than what is written goes away. `onBroken` hears that nobody listens any more.
 */
function lineWriter(onBroken: () => void): PutLines {
  let last = Promise.resolve()
  let finish = () => {}
  const broken = new Set<NodeJS.WriteStream>()
  for (const stream of [process.stdout, process.stderr])
    stream.on("error", () => {
      if (!broken.has(stream)) onBroken()
      broken.add(stream)
      finish()
    })
  const write = (to: NodeJS.WriteStream, whole: Buffer) =>
    new Promise<void>((resolve) => {
      finish = resolve
      if (broken.has(to)) resolve()
      else to.write(whole, () => resolve())
    })
  return (to, whole) => (last = last.then(() => write(to, whole)))
}

/** Copies a stream with a label before each line. */
async function labelLines(
  from: ReadableStream<Uint8Array>,
  to: NodeJS.WriteStream,
  how: { label: string; put: PutLines },
): Promise<void> {
  const label = Buffer.from(how.label)
  let rest: Uint8Array[] = []
  const put = (whole: Buffer) => how.put(to, labelled(whole, label))
  for await (const chunk of from) {
    const end = chunk.lastIndexOf(10) + 1
    if (end > 0) await put(Buffer.concat([...rest, chunk.subarray(0, end)]))
    if (end > 0) rest = []
    if (end < chunk.length) rest.push(chunk.slice(end))
  }
  if (rest.length > 0) await put(Buffer.concat([...rest, Buffer.from("\n")]))
}

/** Whole lines, each with the label before it. */
function labelled(whole: Buffer, label: Buffer): Buffer {
  const pieces: Buffer[] = []
  for (let at = 0; at < whole.length;) {
    const end = whole.indexOf(10, at) + 1
    pieces.push(label, whole.subarray(at, end))
    at = end
  }
  return Buffer.concat(pieces)
}

/** The table at the end: host, exit code, time, result links. */
export function hostTable(runs: readonly HostRun[]): string {
  const rows = runs.map(({ host, state, code, seconds, report }) => {
    if (state === "not run") return [shown(host.name), "-", "not run"]
    const links = (report.resultLinks ?? []).map(({ link }) => shown(path.relative(process.cwd(), link)))
    const exit = state === "stopped" ? "stopped" : String(code)
    return [shown(host.name), exit, `${seconds.toFixed(1)} s`, links.join(" ")]
  })
  return alignRows([["host", "exit", "time", "results"], ...rows])
    .map((line) => `edict: ${line}\n`)
    .join("")
}

/** Rows of a table as lines, columns padded; the last cell of a row that is shorter than the first may be longer. */
function alignRows(rows: readonly (readonly string[])[]): string[] {
  const count = rows[0]!.length
  const widths = rows[0]!.map((_, column) =>
    Math.max(
      ...rows.map((row) => (row.length === count || column < row.length - 1 ? row[column]!.length : 0)),
    ),
  )
  return rows.map((row) =>
    row
      .map((cell, column) => cell.padEnd(widths[column]!))
      .join("  ")
      .trimEnd(),
  )
}

/** Hands signals on; the second one ends this program. */
function relaySignals(stop: (signal: NodeJS.Signals) => void): { dispose: () => void } {
  let count = 0
  const handlers = (["SIGINT", "SIGTERM", "SIGHUP"] as const).map((signal) => {
    const handler = () => {
      stop(signal)
      if (++count > 1) process.exit(signalCode(signal))
    }
    process.on(signal, handler)
    return { signal, handler }
  })
  return { dispose: () => handlers.forEach(({ signal, handler }) => process.off(signal, handler)) }
}

// ── 20. Probe: what a host is like, for --pick, --hosts and --doctor ────────────────────────────────────

/**
 * Answers lines `f KEY VALUE`, after a line that the other side answers, for the way there and back. The second line
 * of its input says how much is asked: pick, hosts or doctor. Settings of Nix come from `config show` (2.20) or
 * `show-config`.
 */
export const PROBE_SCRIPT = sh`
${REMOTE_PATH}
IFS= read -r base
IFS= read -r depth
case $base in /*) ;; *) base=$HOME/$base ;; esac
fact() { printf 'f %s %s\n' "$1" "$2"; }
echo
fact time "$(date +%s)"
fact ping yes
IFS= read -r _
fact pong yes
fact nix.path "$(command -v nix)"
fact nix "$(nix --version 2>/dev/null)"
nix_command() { nix --extra-experimental-features nix-command "$@"; }
{ nix_command config show 2>/dev/null || nix_command show-config 2>/dev/null; } |
  sed -n -E 's/^(system|extra-platforms|system-features|sandbox|substituters|experimental-features|trusted-users|secret-key-files) = /f set.\1 /p'
fact load "$(cut -d' ' -f1 /proc/loadavg 2>/dev/null || uptime | sed 's/.*load average[s]*: *\([0-9.,]*\).*/\1/')"
fact cpus "$(getconf _NPROCESSORS_ONLN 2>/dev/null)"
[ "$depth" != pick ] || { fact end yes; exit; }
existing() { d=$1; while [ -n "$d" ] && [ ! -e "$d" ]; do d=$\{d%/*}; done; printf '%s\n' "$\{d:-/}"; }
free() { df -Pk "$(existing "$1")" 2>/dev/null | awk 'END { print $4 }'; }
fact free.store "$(free /nix/store)"
fact free.trees "$(free "$base")"
if [ "$depth" = doctor ]; then
  fact user "$(id -un)"
  fact groups "$(id -Gn)"
  fact shell "$\{SHELL:-}"
  fact kernel "$(uname -sm)"
  for tool in find stat awk tr xargs tar sed paste mkfifo cmp readlink ps; do
    if command -v "$tool" >/dev/null; then fact "tool.$tool" yes; fi
  done
  fact rsync "$(command -v rsync >/dev/null && rsync --version 2>&1 | head -n 1)"
  fact git "$(git --version 2>/dev/null)"
  fact store "$(nix_command store info --json 2>/dev/null || nix_command store ping --json 2>/dev/null)"
  if [ -w "$(existing "$base")" ]; then fact writable yes; fi
fi
fact end yes
fact used "$(du -sk "$base" 2>/dev/null | cut -f1)"
`

type Facts = ReadonlyMap<string, string>

/** What a probe found; `error` where the host did not answer. */
export type Probe = Readonly<{
  host: Host
  facts: Facts
  error?: string
  multiplexed: boolean
  latency: number // milliseconds there and back
  skew: number // seconds that its clock is ahead
}>

type Depth = "pick" | "hosts" | "doctor"

/** Seconds within which a host must answer, where ssh's configuration does not say. */
const PROBE_SECONDS = 5

/**
 * Asks a host what it is like. One that does not answer within the connect timeout is no error here; nor does one
 * that then answers slowly hold up the others for longer than that again. `mayAsk`: for a password.
 */
async function probeHost(host: Host, env: Env, how: { depth: Depth; mayAsk?: boolean }): Promise<Probe> {
  const settings = await capture(["ssh", "-G", ...host.sshOptions, "--", host.destination], "may-fail")
  const seconds = Number(/^connecttimeout (\d+)$/m.exec(settings)?.[1]) || PROBE_SECONDS
  const limit = ["-o", `ConnectTimeout=${seconds}`, ...(how.mayAsk ? [] : ["-o", "BatchMode=yes"])]
  saveHostKey(host)
  const began = performance.now()
  const patience = (how.mayAsk ? 60 : seconds) * 1000
  const { control, errors } = await openProbeMaster(host, env, { limit, patience })
  const asked =
    control === "" ? undefined : await askHost(host, { control, limit, seconds, depth: how.depth })
  if (asked && asked.facts.has("pong")) return asked
  const left = began + patience - performance.now()
  if (
    control !== "" ||
    /timed out|refused|No route|unreachable|resolve|denied|verification/.test(errors) ||
    left < 100
  )
    return silent(
      host,
      asked?.error ?? (errors === "" ? `no answer within ${seconds} s` : sshError(host, errors).message),
    )
  return await askHost(host, { control: "", limit, seconds: left / 1000, depth: how.depth })
}

const silent = (host: Host, error: string): Probe => ({
  host,
  facts: new Map(),
  error,
  multiplexed: false,
  latency: 0,
  skew: 0,
})

/** Runs the probe's script on a host and reads what it says. */
async function askHost(
  host: Host,
  how: { control: string; limit: readonly string[]; seconds: number; depth: Depth },
): Promise<Probe> {
  const reach = { plan: { host }, control: how.control, noisy: false }
  const [program, ...words] = sshArguments(reach)
  const child = Bun.spawn([program!, ...how.limit, ...words, BOOT_LINE], {
    stdin: "pipe",
    stdout: "pipe",
    stderr: "pipe",
    env: cleanEnvironment(),
  })
  const write = (text: string) => {
    child.stdin.write(text)
    child.stdin.flush()
  }
  const facts = new Map<string, string>()
  const errors = child.stderr.text()
  let [pinged, latency, skew] = [0, 0, 0]
  let multiplexed = Promise.resolve(how.control !== "")
  let timer = setTimeout(() => child.kill("SIGKILL"), how.seconds * 1000)
  write(`${encodeScript(PROBE_SCRIPT)}\n${host.directory}\n${how.depth}\n`)
  await eachLine(child.stdout, (line) => {
    const [, key, value] = /^f (\S+) ?(.*)$/.exec(line) ?? []
    if (key === undefined) return
    facts.set(key, value!)
    if (key === "time") skew = Number(value) + 0.5 - Date.now() / 1000
    if (key === "ping") {
      pinged = performance.now()
      write("\n")
    }
    if (key !== "pong") return
    latency = performance.now() - pinged
    clearTimeout(timer)
    timer = setTimeout(() => child.kill("SIGKILL"), how.seconds * 1000)
    // A second session while this one is open: a server that refuses it makes ssh connect anew.
    if (how.depth === "doctor" && how.control !== "") multiplexed = takesSessions(reach)
  }).catch(() => undefined)
  const code = await child.exited
  clearTimeout(timer)
  const said = await Promise.race([errors, delay(500).then(() => "")])
  if (!facts.has("pong"))
    return silent(
      host,
      child.signalCode === "SIGKILL"
        ? `no answer within ${Math.round(how.seconds)} s`
        : code === 255
          ? sshError(host, said).message
          : `no answer (exit ${code})${because(said)}`,
    )
  return { host, facts, multiplexed: await multiplexed, latency, skew }
}

/** Whether a host takes a further session in a connection that has one. */
async function takesSessions(reach: Reach): Promise<boolean> {
  const { stderr } = await collect([...sshArguments(reach), "exec true"], {
    what: "session",
    stdin: "ignore",
  })
  return !/refused|disabling multiplexing|open failed/i.test(stderr)
}

/** Calls for each line of a stream as it comes. */
async function eachLine(from: ReadableStream<Uint8Array>, take: (line: string) => void): Promise<void> {
  const decoder = new TextDecoder()
  let rest = ""
  for await (const chunk of from) {
    const parts = (rest + decoder.decode(chunk, { stream: true })).split("\n")
    rest = parts.pop()!
    parts.forEach(take)
  }
}

/** The shared connection, found open or opened now, if it can be had in time; "" and what ssh said if not. */
async function openProbeMaster(
  host: Host,
  env: Env,
  how: { limit: readonly string[]; patience: number },
): Promise<{ control: string; errors: string }> {
  const control = controlPath({ host }, env)
  if (control === "") return { control: "", errors: "" }
  const to = [...host.sshOptions, "-o", `ControlPath=${control}`]
  const isOpen = async () =>
    fs.existsSync(control) && (await succeeds(["ssh", ...to, "-O", "check", "--", host.destination]))
  if (await isOpen()) return { control, errors: "" }
  const locks = lockAll([`${control}.lock`]) // another run is opening it: this one need not share
  if (locks === undefined) return { control: "", errors: "" }
  try {
    if (await isOpen()) return { control, errors: "" }
    fs.rmSync(control, { force: true })
    const persistent = ["-o", "ControlMaster=yes", "-o", "ControlPersist=60", "-o", "RequestTTY=no"]
    const words = [...how.limit, ...(await livelinessOptions(host)), ...persistent, ...to]
    const child = Bun.spawn(["ssh", ...words, "-T", "-f", "-N", "--", host.destination], {
      stdin: "ignore",
      stdout: "ignore",
      stderr: "pipe",
      env: cleanEnvironment(),
    })
    const timer = setTimeout(() => child.kill("SIGKILL"), how.patience)
    const errors = child.stderr.text() // the master holds it open as long as it lives
    const code = await child.exited
    clearTimeout(timer)
    if (code === 0 && fs.existsSync(control)) return { control, errors: "" }
    return { control: "", errors: await Promise.race([errors, delay(500).then(() => "")]) }
  } finally {
    for (const lock of locks) fs.closeSync(lock)
  }
}

/** Systems that a host builds for: the config's word, else Nix's own settings there. */
function systemsOf({ host, facts }: Probe): string[] {
  if (host.systems.length > 0) return [...host.systems]
  return [facts.get("set.system") ?? "", ...(facts.get("set.extra-platforms") ?? "").split(" ")].filter(
    (system) => system !== "",
  )
}

/** The same for people: without the x86_64-v3-linux and the like that Nix adds. */
const shownSystems = (probe: Probe): string[] =>
  systemsOf(probe)
    .filter((system) => !/^x86_64-v\d-/.test(system) || probe.host.systems.length > 0)
    .map(shown)

/** System features of a host: the config's word, with the mandatory ones, else Nix's own settings there. */
function featuresOf({ host, facts }: Probe): string[] {
  const named = [...new Set([...host.features, ...host.mandatoryFeatures])]
  return named.length > 0
    ? named
    : (facts.get("set.system-features") ?? "").split(" ").filter((name) => name !== "")
}

// ── 21. Pick: one host out of several ───────────────────────────────────────────────────────────────────

/** The system of this machine, as Nix names it. */
export function systemHere(): string {
  const machine = { x64: "x86_64", arm64: "aarch64", ia32: "i686" }[process.arch as string] ?? process.arch
  return `${machine}-${process.platform}`
}

/** The same as Nix's own settings here have it. */
async function ownSystem(env: Env): Promise<string> {
  const system = hasProgram("nix", env) ? (await settingsHere(env)).system : undefined
  return typeof system === "string" && system !== "" ? system : systemHere()
}

/** The best host for a command. Throws EdictError that says of each host why it does not fit. */
async function pickHost(
  invocation: Invocation,
  hosts: readonly Host[],
  here: { cwd: string; env: Env },
): Promise<Host> {
  const { options, command } = invocation
  const [program, ...words] = command
  const named = options.system ?? scan(program!, words, linkText).system
  const [probes, system] = await Promise.all([
    Promise.all(hosts.map((host) => probeHost(host, here.env, { depth: "pick" }))),
    named ?? ownSystem(here.env),
  ])
  for (const { host, error } of probes)
    if (error !== undefined && options.verbosity >= 0) say(`${shown(host.name)} is passed over: ${error}`)
  const ranked = rankHosts(probes, { system, features: options.features, last: lastHost(here) })
  if (options.verbosity > 0)
    for (const { host, why, load } of ranked)
      say(
        `pick: ${shown(host.name)} ${why ?? `fits ${system}, load ${load.toFixed(2)} at speed ${host.speed}`}`,
      )
  const best = ranked.find(({ why }) => why === undefined)
  if (best) return best.host
  const need = options.features.length > 0 ? ` with ${options.features.map(shown).join(", ")}` : ""
  throw new EdictError(
    `no host fits ${shown(system)}${need}: ${ranked.map(({ host, why }) => `${shown(host.name)} ${why}`).join("; ")}`,
    "edict --hosts   # or name a host without --pick",
  )
}

export type Ranked = Readonly<{ host: Host; why?: string; load: number }>

/**
 * Hosts, the best first, as Nix ranks its machines (build-remote.cc): system, features and mandatory features must
 * fit, then the lowest load by speed; of equals the one that was used last for this tree, whose store is warm, then
 * the faster. A load is that of one processor, in halves: less is chance, and worth no cold store.
 */
export function rankHosts(
  probes: readonly Probe[],
  need: { system: string; features: readonly string[]; last: string | undefined },
): Ranked[] {
  const order = (a: Ranked, b: Ranked) =>
    Number(a.why !== undefined) - Number(b.why !== undefined) ||
    a.load - b.load ||
    Number(b.host.name === need.last) - Number(a.host.name === need.last) ||
    b.host.speed - a.host.speed
  return probes
    .map((probe): Ranked => {
      const { host, facts } = probe
      const load = (Number(facts.get("load")?.replace(",", ".")) || 0) / (Number(facts.get("cpus")) || 1)
      return { host, load: Math.round(2 * load) / 2 / host.speed, why: whyNot(probe, need) }
    })
    .sort(order)
}

/** Why a host cannot be picked; undefined if it can. */
function whyNot(probe: Probe, need: { system: string; features: readonly string[] }): string | undefined {
  const { host, facts, error } = probe
  if (error !== undefined) return "does not answer"
  if ((facts.get("nix") ?? "") === "") return facts.has("end") ? "has no Nix" : "answers too slowly"
  const systems = systemsOf(probe)
  if (!systems.includes(need.system)) return `is for ${shownSystems(probe).join(", ") || "no system"}`
  const features = featuresOf(probe)
  const lacking = need.features.filter((feature) => !features.includes(feature))
  if (lacking.length > 0) return `lacks ${lacking.map(shown).join(", ")}`
  const mandatory = host.mandatoryFeatures.filter((feature) => !need.features.includes(feature))
  if (mandatory.length > 0) return `takes only what needs ${mandatory.map(shown).join(", ")}`
  return undefined
}

const lastHostFile = (here: { cwd: string; env: Env }): string =>
  path.join(stateDirectory(here.env), "last", hash(gitRootOf(here.cwd) ?? here.cwd).slice(0, 24))

const lastHost = (here: { cwd: string; env: Env }): string | undefined => readText(lastHostFile(here))?.trim()

/** Notes which host was used for this tree. */
function rememberHost(plan: Plan, env: Env): void {
  const file = lastHostFile({ cwd: plan.cwd.local, env })
  fs.mkdirSync(path.dirname(file), { recursive: true, mode: 0o700 })
  replaceFile(path.dirname(file), path.basename(file), `${plan.host.name}\n`)
}

// ── 22. Hosts, doctor, clean, completion ────────────────────────────────────────────────────────────────

const gibi = (kibibytes: string | undefined): string =>
  kibibytes ? `${(Number(kibibytes) / 2 ** 20).toFixed(1)} GiB` : "?"
const mebi = (kibibytes: string | undefined): string =>
  kibibytes ? `${(Number(kibibytes) / 2 ** 10).toFixed(1)} MiB` : "?"

/** `--hosts`: what the config says of each host, and what it says itself. */
async function listHosts(config: Config, options: Options, env: Env): Promise<number> {
  const invocation = { options }
  const hosts = Object.keys(config.hosts).map((name) => hostNamed(config, name, { invocation, env }))
  if (hosts.length === 0 && !options.json)
    throw new EdictError(
      `no hosts in ${config.file}`,
      '[hosts.NAME] with address = "ssh://user@host"; any host can be used without a config, too',
    )
  const probes = await Promise.all(hosts.map((host) => probeHost(host, env, { depth: "hosts" })))
  const addressOf = ({ host }: Probe) => config.hosts[host.name]?.address ?? host.name
  if (options.json)
    return print(
      `${JSON.stringify(
        probes.map((probe) => probeAsJson(probe, addressOf(probe))),
        null,
        2,
      )}\n`,
    )
  const rows = probes.map((probe) => {
    const { host, facts, error, latency } = probe
    const list = (words: readonly string[]) => words.join(",") || "-"
    const own = [
      host.name,
      addressOf(probe),
      list(shownSystems(probe)),
      list(featuresOf(probe)),
      String(host.speed),
      list(host.tags),
    ]
    const live =
      error === undefined
        ? [
            "yes",
            `${Math.max(1, Math.round(latency))} ms`,
            (facts.get("nix") || "none").replace(/^nix \(.*\) /, ""),
            gibi(facts.get("free.store")),
            facts.get("load") || "?",
            mebi(facts.get("used") || (facts.has("end") ? "0" : undefined)),
          ]
        : [`no: ${error}`]
    return [...own, ...live].map(shown)
  })
  const head = "name address systems features speed tags reachable latency nix free load trees".split(" ")
  return print(`${alignRows([head, ...rows]).join("\n")}\n`)
}

function probeAsJson(probe: Probe, address: string): Record<string, unknown> {
  const { host, facts, error, latency } = probe
  const number = (key: string) => (facts.get(key) ? Number(facts.get(key)!.replace(",", ".")) : null)
  return {
    name: host.name,
    address,
    systems: systemsOf(probe),
    features: featuresOf(probe),
    mandatoryFeatures: host.mandatoryFeatures,
    speed: host.speed,
    tags: host.tags,
    reachable: error === undefined,
    why: error ?? null,
    latencyMilliseconds: error === undefined ? Math.round(latency * 10) / 10 : null,
    nix: facts.get("nix") || null,
    freeKibibytes: number("free.store"),
    usedKibibytes: number("used") ?? (facts.has("end") ? 0 : null),
    load: number("load"),
  }
}

export type Finding = Readonly<{ level: "ok" | "warning" | "problem"; what: string; mend?: string }>

/** `--doctor`: each thing that matters between here and a host, and how to mend it. 0 only if a build would work. */
async function examine(hosts: readonly Host[], options: Options, env: Env): Promise<number> {
  const mayAsk = hosts.length === 1
  const [{ findings: here, store }, probes] = await Promise.all([
    examineHere(env),
    Promise.all(hosts.map((host) => probeHost(host, env, { depth: "doctor", mayAsk }))),
  ])
  const works = (findings: readonly Finding[]) => findings.every(({ level }) => level !== "problem")
  const there = probes.map((probe) => {
    const findings = examineHost(probe, env, store)
    return { host: probe.host.name, works: works(here) && works(findings), findings }
  })
  const code = there.every((host) => host.works) ? 0 : EDICT_FAILED
  if (options.json) {
    print(`${JSON.stringify({ works: code === 0, here, hosts: there }, null, 2)}\n`)
    return code
  }
  const line = ({ level, what, mend }: Finding) =>
    `  ${level.padEnd(8)} ${shown(what)}${mend ? `\n           ${shown(mend)}` : ""}\n`
  print(`here\n${here.map(line).join("")}`)
  for (const { host, findings } of there) print(`${shown(host)}\n${findings.map(line).join("")}`)
  return code
}

const ok = (what: string): Finding => ({ level: "ok", what })
const warning = (what: string, mend?: string): Finding => ({ level: "warning", what, mend })
const problem = (what: string, mend?: string): Finding => ({ level: "problem", what, mend })

/** Whether the store here takes unsigned paths from this user; "none" without Nix. */
type StoreHere = "takes all" | "takes signed" | "none"

/** What this machine needs. */
async function examineHere(env: Env): Promise<{ findings: Finding[]; store: StoreHere }> {
  const tools = ["bash", "ssh", "tar"].map((tool) =>
    hasProgram(tool, env) ? ok(`${tool} is here`) : problem(`no ${tool} here`, `install ${tool}`),
  )
  const unfit = unfitRsync(await askRsync(env))
  tools.push(unfit ? warning(`${unfit} here: files go up by tar`, "install rsync") : ok("rsync is here"))
  const git_ = hasProgram("git", env)
    ? ok("git is here")
    : warning("no git here: flakes in git repositories cannot travel", "install git")
  if (!hasProgram("nix-store", env))
    return {
      findings: [
        ...tools,
        git_,
        warning("no Nix here: results stay on the host", "install Nix, for results to come home"),
      ],
      store: "none",
    }
  const version = lastLine(await capture(["nix", "--version"], "may-fail"))
  const isTrusted = ownsStore(env) || (await isTrustedHere(env))
  const takesAll = isTrusted || (await settingsHere(env))["require-sigs"] === false
  const trust = isTrusted
    ? ok("this user is trusted by the store here")
    : ok("this user is not trusted by the store here")
  return {
    findings: [...tools, git_, ok(version || "Nix is here"), trust],
    store: takesAll ? "takes all" : "takes signed",
  }
}

/** Whether what a host builds can come home. */
function examineResults({ host, facts }: Probe, store: StoreHere): Finding[] {
  if (store === "none") return []
  const signs = (facts.get("set.secret-key-files") ?? "") !== ""
  if (store === "takes all" && !host.requireSignatures) return [ok("unsigned results can come home")]
  if (host.import === "sudo" && !host.requireSignatures)
    return [ok('unsigned results come home through sudo (import = "sudo")')]
  const why = host.requireSignatures
    ? "of this host only signed results may come home (require-signatures)"
    : "the store here takes only signed results from this user"
  if (signs)
    return [warning(`${why}; it signs what it builds`, "its public key must be in trusted-public-keys here")]
  const sign = "secret-key-files in its nix.conf, and the public key in trusted-public-keys here"
  return [
    problem(
      `${why}, and Nix there signs nothing`,
      host.requireSignatures ? sign : `import = "sudo" in [hosts.${host.name}]; or ${sign}`,
    ),
  ]
}

/** Programs that a host must have, besides rsync and Nix. */
const NEEDED_THERE = "find stat awk tr xargs tar sed paste mkfifo cmp readlink".split(" ")

/** Kibibytes of free space below which a build will hardly work, and below which it is time to say so. */
const SPACE = { least: 10 * 2 ** 10, low: 2 * 2 ** 20 }

/** What can be said of a host that was asked. */
export function examineHost(probe: Probe, env: Env, store: StoreHere): Finding[] {
  const { host, facts, error, skew } = probe
  const ssh = ["ssh", ...host.sshOptions, host.destination].map(shellQuote).join(" ")
  const verbose = `${ssh.replace(/^ssh/, "ssh -v")} true`
  const over = (command: string) => `${ssh} ${shellQuote(command)}`
  if (error !== undefined) return [problem(error, verbose)]
  const nix = facts.get("nix") || undefined
  const [major = 0, minor = 0] = (/(\d+)\.(\d+)[^ ]*$/.exec(nix ?? "") ?? []).slice(1).map(Number)
  const isBefore = (wanted: number) => major < 2 || (major === 2 && minor < wanted)
  const latency = Math.max(1, Math.round(probe.latency))
  const seconds = Math.round(Math.abs(skew))
  const hint =
    "grep -i -e MaxSessions /etc/ssh/sshd_config   # must allow some; and /tmp here must take a socket"
  const clock = `its clock is ${seconds} s ${skew > 0 ? "ahead" : "behind"}; edict compares no clocks, but Nix and git do`
  const agent = host.sshOptions.includes("-A")
  return [
    ok(`answers in ${latency} ms as ${facts.get("user") ?? "?"} (${facts.get("kernel") ?? "?"})`),
    facts.has("end") ? [] : warning("answers slowly: not all could be asked", verbose),
    probe.multiplexed
      ? ok("one connection serves every step (multiplexing)")
      : warning("no multiplexing: each step connects anew", over(hint)),
    ok(`login shell ${facts.get("shell") || "unknown"}`),
    examineNix(facts, {
      nix,
      isTooOld: isBefore(4),
      install: over("curl -L https://nixos.org/nix/install | sh"),
    }),
    examineTools(facts, { needsGit: isBefore(20) ? "needed" : "useful", over: nix ? over : undefined }),
    examineSpace(probe, over("nix-collect-garbage")),
    Math.abs(skew) > 5 ? warning(clock, over("timedatectl set-ntp true")) : ok("its clock is right"),
    nix ? [...examineSettings(probe), ...examineResults(probe, store)] : [],
    agent && !env.SSH_AUTH_SOCK
      ? warning("the agent is to be forwarded, but none runs here", 'eval "$(ssh-agent)" && ssh-add')
      : ok(agent ? "the ssh agent is forwarded" : "the ssh agent stays here"),
  ].flat()
}

/** Whether the store there trusts the user there. */
function isTrustedThere(facts: Facts): boolean {
  const groups = (facts.get("groups") ?? "").split(" ").map((name) => `@${name}`)
  const names = [facts.get("user") ?? "", ...groups, "*"]
  const trusted = (facts.get("set.trusted-users") ?? "").split(" ")
  const says = /"trusted":\s*(1|true)/.test(facts.get("store") ?? "")
  return says || facts.get("user") === "root" || trusted.some((name) => names.includes(name))
}

/** The programs that a host needs; `over` says how to run something there, if Nix there can install it. */
function examineTools(
  facts: Facts,
  how: { needsGit: "needed" | "useful"; over: ((command: string) => string) | undefined },
): Finding[] {
  const install = (tool: string) =>
    how.over?.(`nix --extra-experimental-features 'nix-command flakes' profile install nixpkgs#${tool}`) ??
    `install ${tool} there`
  const [rsync, git_] = [facts.get("rsync") ?? "", facts.get("git")]
  const unfit = unfitRsync(rsync)
  const missing = NEEDED_THERE.filter((tool) => !facts.has(`tool.${tool}`))
  const withoutGit =
    how.needsGit === "needed"
      ? problem("no git there, which this Nix needs for flakes in git", install("git"))
      : warning("no git there: commits of the command do not come home", install("git"))
  const packages = "install coreutils, findutils, diffutils, gawk, gnused, gnutar there"
  return [
    unfit ? warning(`${unfit} there: files go up by tar`, install("rsync")) : ok(rsync.replace(/\s+/g, " ")),
    git_ ? ok(git_) : withoutGit,
    missing.length > 0
      ? problem(`no ${missing.join(", ")} there`, packages)
      : ok("the usual tools are there"),
    facts.has("tool.ps")
      ? []
      : warning("no ps there: what outlives its parent may not be ended", "install procps there"),
  ].flat()
}

/** The room for trees and for the store; `collect` frees some of the latter. */
function examineSpace({ host, facts }: Probe, collect: string): Finding[] {
  const space = (key: string, what: string, mend: string) => {
    const free = facts.get(key) ? Number(facts.get(key)) : Number.POSITIVE_INFINITY
    const said = `${free < 2 ** 20 ? mebi(facts.get(key)) : gibi(facts.get(key))} free for ${what}`
    return free < SPACE.least ? problem(said, mend) : free < SPACE.low ? warning(said, mend) : ok(said)
  }
  const trees = `trees, ${mebi(facts.get("used") || "0")} used in ${host.directory}`
  return [
    facts.has("writable")
      ? space("free.trees", trees, `edict --clean ${shellQuote(host.name)}`)
      : problem(`cannot write to ${host.directory} there`, `directory = "…" in [hosts.${host.name}]`),
    space("free.store", "its store", collect),
  ]
}

/** How Nix over there is set up. */
function examineSettings(probe: Probe): Finding[] {
  const { facts } = probe
  const features = featuresOf(probe).join(", ")
  return [
    ok(`builds for ${shownSystems(probe).join(", ") || "?"}${features ? ` with ${features}` : ""}`),
    facts.get("set.sandbox") === "false"
      ? warning("builds run without a sandbox", "sandbox = true in its nix.conf")
      : ok(`sandbox ${facts.get("set.sandbox") ?? "?"}`),
    ok(
      isTrustedThere(probe.facts)
        ? "this user is trusted by the store there"
        : "this user is not trusted by the store there; edict does not need it",
    ),
    ok(`substituters ${facts.get("set.substituters") || "none"}`),
  ]
}

/** Nix over there: whether, where, which, and its flakes. */
function examineNix(
  facts: Facts,
  { nix, isTooOld, install }: { nix: string | undefined; isTooOld: boolean; install: string },
): Finding[] {
  if (nix === undefined && facts.has("end"))
    return [problem("no Nix there, neither on the PATH of a non-interactive shell nor in a profile", install)]
  if (nix === undefined) return [problem("Nix there does not answer in time", "see what slows it down there")]
  if (isTooOld)
    return [problem(`${nix} at ${facts.get("nix.path")} is too old: flakes came with 2.4`, install)]
  const enabled = (facts.get("set.experimental-features") ?? "").split(" ").includes("flakes")
  return [
    ok(`${nix} at ${facts.get("nix.path")}`),
    ok(enabled ? "flakes are enabled" : "flakes are not enabled; edict enables them for its commands"),
  ]
}

/**
 * Removes what edict left on a host, for whichever machine, unless a run is using it; says how many KiB it was. The
 * directory may be one that holds other things, too: only what edict made goes.
 */
export const CLEAN_SCRIPT = sh`
IFS= read -r base
case $base in /*) ;; *) base=$HOME/$base ;; esac
# A number of a process may have gone to another one since.
busy() {
  pid=$(cat "$1" 2>/dev/null) && kill -0 "$pid" 2>/dev/null || return 1
  [ ! -r "/proc/$pid/cmdline" ] || tr '\0' ' ' <"/proc/$pid/cmdline" | grep -q -e 'read -r script' -e 'run='
}
for file in "$base"/run/*/pid "$base"/run/*/agent; do
  if busy "$file"; then echo "a run is using it (process $pid)" >&2; exit 3; fi
done
set --
for directory in "$base"/run "$base"/*; do
  case $directory in "$base"/run) [ $# = 0 ] && [ -d "$directory" ] ;; *) [ -d "$directory/meta" ] ;; esac && set -- "$@" "$directory"
done
if [ $# = 0 ]; then echo 0; exit 0; fi
size=$(du -sck "$@" | tail -n 1 | cut -f1)
find "$@" -type d ! -perm -700 -exec chmod u+rwx {} + 2>/dev/null
rm -rf -- "$@" || exit
rmdir -- "$base" 2>/dev/null
echo "$size"
`

/** `--clean`: everything of edict on these hosts goes. */
async function cleanHosts(hosts: readonly Host[], options: Options, env: Env): Promise<number> {
  const codes = await Promise.all(
    hosts.map(async (host) => {
      saveHostKey(host)
      const limit = (await livelinessOptions(host)).concat(hosts.length > 1 ? ["-o", "BatchMode=yes"] : [])
      const { control } = await openProbeMaster(host, env, { limit, patience: 60_000 })
      const [ssh, ...words] = sshArguments({ plan: { host }, control, noisy: false })
      const answer = await collect([ssh!, ...limit, ...words, BOOT_LINE], {
        what: "clean",
        input: Buffer.from(`${encodeScript(CLEAN_SCRIPT)}\n${host.directory}\n`),
        stdin: "pipe",
      })
      if (answer.code === 255) return tell(sshError(host, answer.stderr))
      if (answer.code === 3)
        return tell(
          new EdictError(
            `${shown(host.name)}: nothing removed: ${lastLine(answer.stderr)}`,
            "again when it has ended",
          ),
        )
      const size = lastLine(answer.stdout)
      if (answer.code !== 0 || !/^\d+$/.test(size))
        return tell(new EdictError(`${shown(host.name)}: not all could be removed${because(answer.stderr)}`))
      if (options.verbosity >= 0)
        say(`${shown(host.name)}: ${size === "0" ? "there was nothing to remove" : `${mebi(size)} removed`}`)
      return 0
    }),
  )
  return Math.max(0, ...codes)
}

/** Words for completing HOST: names and tags of the config, and hosts of ssh_config. */
function hostWords(config: Config, env: Env): string {
  const names = Object.keys(config.hosts)
  const tags = names.length > 0 ? ["all", ...Object.values(config.hosts).flatMap((host) => host.tags)] : []
  const words = [
    ...names,
    ...tags.map((tag) => `@${tag}`),
    ...sshHosts(path.join(homeOf(env), ".ssh/config"), env),
  ]
  return [...new Set(words)]
    .filter((word) => !/[\s,]/.test(word))
    .map((word) => `${word}\n`)
    .join("")
}

/** Names that an ssh_config and what it includes gives to hosts; patterns are none. */
function sshHosts(file: string, env: Env, depth = 0): string[] {
  return (readText(file) ?? "").split("\n").flatMap((line) => {
    const [, keyword = "", rest = ""] = /^\s*(Host|Include)(?:\s+|\s*=\s*)(.*)$/i.exec(line) ?? []
    const words = (rest.match(/"[^"]*"|\S+/g) ?? []).map((word) => word.replace(/^"(.*)"$/, "$1"))
    if (keyword.toLowerCase() === "host") return words.filter((word) => !/[*?!]/.test(word))
    if (keyword === "" || depth > 8) return []
    return words.flatMap((word) => {
      const pattern = path.resolve(homeOf(env), ".ssh", word.replace(/^~(?=\/)/, homeOf(env)))
      return fs.globSync(pattern).flatMap((included) => sshHosts(included, env, depth + 1))
    })
  })
}

/** Words that a value of an option can be, for completions; files where there are none. */
const COMPLETED_VALUES: readonly [option: string, values: string][] = [
  ["--completion", "bash zsh fish"],
  ["--system", "x86_64-linux aarch64-linux x86_64-darwin aarch64-darwin"],
  ["--features", "big-parallel kvm nixos-test benchmark"],
]

/** A completion script; the words behind the host are left to Nix's own completion. Throws UsageError for other shells. */
export function completionScript(shell: string): string {
  const scripts: Record<string, string> = {
    bash: BASH_COMPLETION,
    zsh: ZSH_COMPLETION,
    fish: FISH_COMPLETION,
  }
  const script = Object.hasOwn(scripts, shell) ? scripts[shell] : undefined
  if (script === undefined)
    throw new UsageError(`no completions for ${shown(shell)}`, "edict --completion bash|zsh|fish")
  const isOffered = (name: string) => name !== "complete-hosts" && name !== "link-suffix"
  const flags = [...FLAG_OPTIONS, "no-sync", "no-tty"].filter(isOffered).map((name) => `--${name}`)
  const withValue = VALUE_OPTIONS.filter(isOffered).map((name) => `--${name}`)
  const ssh = SSH_VALUE_OPTIONS.map((letter) => `-${letter}`)
  const cases = (line: (option: string, values: string) => string) =>
    COMPLETED_VALUES.map(([option, values]) => line(option, values)).join("\n")
  return script
    .replaceAll("@OPTIONS@", [...flags, ...withValue].toSorted().join(" "))
    .replaceAll("@VALUED@", [...ssh, ...withValue, "--link-suffix"].join(" | "))
    .replaceAll("@FISH_VALUED@", [...ssh, ...withValue, "--link-suffix"].join(" "))
    .replaceAll(
      "@BASH_VALUES@",
      cases((option, values) => `      ${option}) _edict_offer ${values} ;;`),
    )
    .replaceAll(
      "@ZSH_VALUES@",
      cases((option, values) => `      ${option}) compadd -- ${values} ;;`),
    )
    .replaceAll(
      "@FISH_VALUES@",
      cases((option, values) => `        case ${option}\n            printf '%s\\n' ${values}`),
    )
    .trimStart()
}

const BASH_COMPLETION = sh`
# The words that begin as the current one does. Bash replaces only what stands behind the last : or = of a word, or
# from its last @ on.
_edict_offer() {
  local word cut=
  if [ -n "$\{COMP_LINE-}" ]; then
    local breaks=$\{COMP_WORDBREAKS//[!:=@]/}
    if [ -n "$breaks" ]; then cut=$\{current%"$\{current##*["$breaks"]}"} cut=$\{cut%@}; fi
  fi
  for word; do
    case $word in "$current"*) COMPREPLY+=("$\{word#"$cut"}") ;; esac
  done
}

# What Nix offers for the word of this number.
_edict_nix() {
  local line kind= found=()
  while IFS= read -r line; do
    if [ -n "$kind" ]; then found+=("$\{line%%$'\t'*}"); else kind=$\{line%%$'\t'*}; fi
  done < <(NIX_CONFIG="$\{NIX_CONFIG:+$NIX_CONFIG$'\n'}extra-experimental-features = nix-command flakes" NIX_GET_COMPLETIONS=$1 "$\{@:2}" 2>/dev/null)
  case $kind in
    filenames) compopt -o filenames 2>/dev/null ;;
    attrs) compopt -o nospace 2>/dev/null ;;
  esac
  _edict_offer "$\{found[@]}"
}

_edict() {
  COMPREPLY=()
  local words=() rest=$\{COMP_LINE-} at=1 last current trimmed word before hosts=
  if [ -n "$rest" ]; then
    # Bash cuts words at : = and @, too: these are put together again, up to the cursor.
    rest=$\{rest:0:COMP_POINT}
    for ((at = 0; at <= COMP_CWORD; at++)); do
      trimmed=$\{rest#"$\{rest%%[![:space:]]*}"}
      word=$\{COMP_WORDS[at]}
      if [ "$at" -eq "$COMP_CWORD" ]; then word=$trimmed; fi
      if [ "$at" -eq 0 ] || [ "$trimmed" != "$rest" ]; then words+=("$word"); else words[$\{#words[@]} - 1]+=$word; fi
      rest=$\{trimmed#"$\{COMP_WORDS[at]}"}
    done
  else
    words=("$\{COMP_WORDS[@]:0:COMP_CWORD+1}")
  fi
  last=$(($\{#words[@]} - 1)) current=$\{words[$\{#words[@]} - 1]} at=1
  while [ "$at" -lt "$last" ]; do
    case $\{words[at]} in
      --) at=$((at + 1)); break ;;
      --doctor | --clean) hosts=all at=$((at + 1)) ;;
      @VALUED@) at=$((at + 2)) ;;
      -*) at=$((at + 1)) ;;
      *) break ;;
    esac
  done
  if [ "$at" -gt "$last" ]; then
    case $\{words[last - 1]} in
@BASH_VALUES@
    esac
    return
  fi
  if [ "$at" -eq "$last" ] || [ -n "$hosts" ]; then
    case $current in
      -*) _edict_offer @OPTIONS@ ;;
      *)
        case $current in *,*) before=$\{current%,*}, ;; *) before= ;; esac
        mapfile -t words < <(edict --complete-hosts 2>/dev/null)
        if [ -z "$hosts$before" ]; then words+=(nix); fi
        _edict_offer "$\{words[@]/#/$before}" ;;
    esac
    return
  fi
  case $\{words[at]} in nix | nix-* | nixos-* | nom | nom-*) ;; *) at=$((at + 1)) ;; esac
  if [ "$at" -eq "$last" ]; then _edict_offer nix nix-build nix-shell nixos-rebuild; fi
  if [ "$\{words[at]}" = nom ]; then words[at]=nix; fi
  case $\{words[at]} in
    '' | nix-* | nixos-* | nom-*) ;;
    nix) if [ "$at" -lt "$last" ]; then _edict_nix $((last - at)) "$\{words[@]:at}"; fi ;;
    *) if [ "$\{#COMPREPLY[@]}" -eq 0 ]; then _edict_nix $((last - at + 2)) nix run "$\{words[@]:at}"; fi ;;
  esac
}
complete -o default -F _edict edict
`

const ZSH_COMPLETION = sh`
#compdef edict
_edict_nix() {
  local -a answer found how
  answer=("$\{(@f)$(NIX_CONFIG="$\{NIX_CONFIG:+$NIX_CONFIG$'\n'}extra-experimental-features = nix-command flakes" NIX_GET_COMPLETIONS=$1 "$\{(@)@[2,-1]}" 2>/dev/null)}")
  found=("$\{(@)$\{(@)answer[2,-1]}%%$'\t'*}")
  case $\{answer[1]%%$'\t'*} in
    filenames) how=(-f) ;;
    attrs) how=(-S '') ;;
  esac
  [[ -z $answer[2] ]] || compadd $how -- "$\{(@)found}"
}
_edict() {
  local at=2 hosts=
  local -a typed offered
  typed=("$\{(@Q)words}")
  while (( at < CURRENT )); do
    case $typed[at] in
      --) (( at += 1 )); break ;;
      --doctor | --clean) hosts=all; (( at += 1 )) ;;
      @VALUED@) (( at += 2 )) ;;
      -*) (( at += 1 )) ;;
      *) break ;;
    esac
  done
  if (( at > CURRENT )); then
    case $typed[CURRENT-1] in
@ZSH_VALUES@
      *) _files ;;
    esac
    return
  fi
  if (( at == CURRENT )) || [[ -n $hosts ]]; then
    if [[ $typed[CURRENT] == -* ]]; then compadd -- @OPTIONS@; return; fi
    offered=("$\{(@f)$(edict --complete-hosts 2>/dev/null)}")
    if ! compset -P '*,' && [[ -z $hosts ]]; then offered+=(nix); fi
    compadd -- $offered
    return
  fi
  case $typed[at] in nix | nix-* | nixos-* | nom | nom-*) ;; *) (( at += 1 )) ;; esac
  if (( at == CURRENT )); then
    compadd -- nix nix-build nix-shell nixos-rebuild
    [[ -z $typed[at] || $typed[at] == nix* ]] && return
  fi
  if (( at < CURRENT )) && [[ $typed[at] == nom ]]; then typed[at]=nix; fi
  case $typed[at] in
    nix) _edict_nix $(( CURRENT - at )) "$\{(@)typed[at,-1]}" ;;
    nix-* | nixos-* | nom-*) _files ;;
    *) _edict_nix $(( CURRENT - at + 2 )) nix run "$\{(@)typed[at,-1]}" ;;
  esac
}
if [[ $zsh_eval_context[-1] == loadautofunc ]]; then _edict "$@"; else compdef _edict edict; fi
`

const FISH_COMPLETION = sh`
# What can stand at the cursor: an option's value, an option or a host, or a word of the command.
function __edict_complete
    set -l words (commandline -opc) (commandline -ct)
    set -l last (count $words)
    set -l at 2
    set -l hosts
    while test $at -lt $last
        switch $words[$at]
            case --
                set at (math $at + 1)
                break
            case --doctor --clean
                set hosts all
                set at (math $at + 1)
            case @FISH_VALUED@
                set at (math $at + 2)
            case '-*'
                set at (math $at + 1)
            case '*'
                break
        end
    end
    if test $at -gt $last
        __edict_value $words[(math $last - 1)] $words[$last]
    else if test $at -eq $last; or set -q hosts[1]
        __edict_host "$words[$last]" "$hosts"
    else
        if not string match -qr '^(nix(-.*|os-.*)?|nom(-.*)?)$' -- $words[$at]
            set at (math $at + 1)
        end
        if test $at -lt $last; and test "$words[$at]" = nom
            set words[$at] nix
        end
        __edict_command (math $last - $at) $words[$at..-1]
    end
end
function __edict_value
    switch $argv[1]
@FISH_VALUES@
        case '*'
            __fish_complete_path $argv[2]
    end
end
function __edict_host
    switch $argv[1]
        case '-*'
            printf '%s\n' @OPTIONS@
        case '*,*'
            set -l before (string replace -r '[^,]*$' '' -- $argv[1])
            printf "$before%s\n" (edict --complete-hosts 2>/dev/null)
        case '*'
            edict --complete-hosts 2>/dev/null
            test -n "$argv[2]"; or echo nix
    end
end
function __edict_command
    set -l features "extra-experimental-features = nix-command flakes"
    test -z "$NIX_CONFIG"; or set features $NIX_CONFIG\n$features
    if test $argv[1] -eq 0
        printf '%s\n' nix nix-build nix-shell nixos-rebuild
        string match -qr '^(nix.*)?$' -- "$argv[2]"; and return
    end
    switch $argv[2]
        case nix
            NIX_CONFIG=$features NIX_GET_COMPLETIONS=$argv[1] $argv[2..-1] 2>/dev/null | tail -n +2
        case 'nix-*' 'nixos-*' 'nom-*'
            __fish_complete_path $argv[-1]
        case '*'
            NIX_CONFIG=$features NIX_GET_COMPLETIONS=(math $argv[1] + 2) nix run $argv[2..-1] 2>/dev/null | tail -n +2
    end
end
complete -c edict -e
complete -c edict -f -a '(__edict_complete)'
`

// ── 23. Files, messages and errors ──────────────────────────────────────────────────────────────────────

export const EDICT_FAILED = 254
export const SSH_FAILED = 255

/** The hash of something that is not known; equal to no file's. */
const UNKNOWN = "unknown"

/** Text as the bytes that the file system has, one character a byte; and back, for people. */
export const bytes = (value: string): string => Buffer.from(value, "utf8").toString("latin1")
export const text = (value: string): string => Buffer.from(value, "latin1").toString("utf8")
const buffer = (value: string): Buffer => Buffer.from(value, "latin1")

/** How to print to a descriptor: with colours only on a terminal. */
const lookOf = (descriptor: number): "plain" | "coloured" =>
  isTerminal(descriptor) && wantsColour() ? "coloured" : "plain"

/** Whether colours are wanted (NO_COLOR, TERM=dumb). */
const wantsColour = (): boolean => !process.env.NO_COLOR && process.env.TERM !== "dumb"

const lines = (output: string): string[] => output.split("\n").filter((line) => line !== "")
const firstLine = (output: string): string => lines(output)[0] ?? ""
const lastLine = (output: string): string => lines(output).at(-1)?.trim() ?? ""
const because = (errors: string): string => (lastLine(errors) === "" ? "" : `: ${shown(lastLine(errors))}`)
const delay = (milliseconds: number): Promise<void> =>
  new Promise((resolve) => setTimeout(resolve, milliseconds).unref())
const homeOf = (env: Env): string => env.HOME || os.homedir()

const sum = (numbers: readonly number[]): number => numbers.reduce((total, number) => total + number, 0)

function partition<T>(items: readonly T[], test: (item: T) => boolean): [T[], T[]] {
  return [items.filter(test), items.filter((item) => !test(item))]
}

/** SHA-256 in hexadecimal. */
const hash = (content: string | Uint8Array): string =>
  new Bun.CryptoHasher("sha256").update(content).digest("hex")

/** 32 random hexadecimal digits. */
const randomName = (): string => Buffer.from(crypto.getRandomValues(new Uint8Array(16))).toString("hex")

const isWithin = (inner: string, outer: string): boolean =>
  inner === outer || inner.startsWith(outer.endsWith("/") ? outer : `${outer}/`)

function readText(file: string): string | undefined {
  try {
    return fs.readFileSync(file, "utf8")
  } catch {
    return undefined
  }
}

function canWrite(directory: string): boolean {
  try {
    fs.accessSync(directory, fs.constants.W_OK)
    return true
  } catch {
    return false
  }
}

function hasProgram(name: string, env: Env): boolean {
  return Bun.which(name, { PATH: env.PATH ?? "" }) !== null
}

const isTerminal = (descriptor: number): boolean => {
  try {
    return fs.fstatSync(descriptor).isCharacterDevice() && require("node:tty").isatty(descriptor)
  } catch {
    return false
  }
}

type Stat = fs.BigIntStats

function lstat(file: string): Stat | undefined {
  try {
    // A string where it can be: half the time of a Buffer.
    return fs.lstatSync(/[^\0-\x7f]/.test(file) ? buffer(file) : file, { bigint: true })
  } catch {
    return undefined
  }
}

function typeOf(stat: Stat): Entry["type"] | "other" {
  return stat.isFile() ? "file" : stat.isSymbolicLink() ? "link" : stat.isDirectory() ? "directory" : "other"
}

/** What stat says of a file: changes with every write, chmod, rename and replacement. */
const identityOf = (stat: Stat): string => `${stat.ino} ${stat.size} ${stat.mtimeNs} ${stat.ctimeNs}`

/** The same but for ctime, which a rename changes, too. */
function contentIdentity(file: string): string {
  const stat = lstat(file)
  return stat ? `${stat.ino} ${stat.size} ${stat.mtimeNs}` : ""
}

/** SHA-256 of a file's content or a link's text; read in pieces. "" for directories. Throws EdictError if it cannot be read. */
function contentHash(file: string, type: Entry["type"]): string {
  if (type === "directory") return ""
  if (type === "link") return hash(fs.readlinkSync(buffer(file), { encoding: "buffer" }))
  const hasher = new Bun.CryptoHasher("sha256")
  const piece = Buffer.allocUnsafe(1 << 20)
  let descriptor
  try {
    descriptor = fs.openSync(buffer(file), "r")
    for (let length = -1; length !== 0;) {
      length = fs.readSync(descriptor, piece, 0, piece.length, null)
      hasher.update(piece.subarray(0, length))
    }
  } catch (error) {
    throw new EdictError(
      `cannot read ${shown(text(file))}: ${reason(error)}`,
      `ls -l ${shellQuote(shown(text(file)))}`,
    )
  } finally {
    if (descriptor !== undefined) fs.closeSync(descriptor)
  }
  return hasher.digest("hex")
}

type LocalState = Readonly<{ type: Entry["type"]; mode: number; hash: string }>

/** What lies at a path now, with its content's hash; undefined for nothing or something that never travels. */
function stateOf(file: string): LocalState | undefined {
  const stat = lstat(file)
  const type = stat && typeOf(stat)
  if (!stat || !type || type === "other") return undefined
  return { type, mode: Number(stat.mode & 0o777n), hash: contentHash(file, type) }
}

function currentUmask(): number {
  return process.umask()
}

/** Puts a file under a second name that must not exist yet (EEXIST); copied where links cannot be. */
function linkOrCopy(from: string, to: string): void {
  try {
    fs.linkSync(buffer(from), buffer(to))
  } catch (error) {
    const code = (error as NodeJS.ErrnoException).code
    if (code !== "EXDEV" && code !== "EPERM" && code !== "ENOTSUP" && code !== "EMLINK") throw error
    copyBeside(from, to)
  }
}

/** Copies a file to a name that must not exist yet (EEXIST); the copy appears there whole or not at all. */
function copyBeside(from: string, to: string): void {
  const temporary = `${path.posix.dirname(to)}/.edict-stage-${randomName()}`
  try {
    copyFile(from, temporary)
    fs.linkSync(buffer(temporary), buffer(to))
  } catch (error) {
    const code = (error as NodeJS.ErrnoException).code
    if ((code !== "EPERM" && code !== "ENOTSUP") || !lstat(temporary) || lstat(to)) throw error
    moveFile(temporary, to) // no hard links on this file system
  } finally {
    fs.rmSync(buffer(temporary), { force: true })
  }
}

function copyFile(from: string, to: string): void {
  if (lstat(from)?.isSymbolicLink())
    fs.symlinkSync(fs.readlinkSync(buffer(from), { encoding: "buffer" }), buffer(to))
  else fs.copyFileSync(buffer(from), buffer(to), fs.constants.COPYFILE_EXCL)
}

function moveFile(from: string, to: string): void {
  fs.renameSync(buffer(from), buffer(to))
}

/** Removes a directory if nothing is in it. */
function removeIfEmpty(directory: string): void {
  try {
    fs.rmdirSync(buffer(directory))
  } catch {
    // something is in it
  }
}

/** Locks all of these files for the time that this process has them open; undefined if another has one of them. */
function lockAll(files: readonly string[]): number[] | undefined {
  const [exclusive, atOnce] = [2, 4] // LOCK_EX, LOCK_NB of flock(2); released by the kernel, however a process ends
  const { symbols } = openLibrary({ flock: { args: ["i32", "i32"], returns: "i32" } })
  const locked: number[] = []
  for (const file of new Set(files)) {
    fs.mkdirSync(path.dirname(file), { recursive: true, mode: 0o700 })
    const descriptor = fs.openSync(file, "a", 0o600)
    locked.push(descriptor)
    if (symbols.flock!(descriptor, exclusive | atOnce) === 0) continue
    for (const held of locked) fs.closeSync(held)
    return undefined
  }
  return locked
}

/** Locks a file as soon as no other process has it. */
async function lockSoon(file: string): Promise<number[]> {
  for (;;) {
    const locked = lockAll([file])
    if (locked) return locked
    await Bun.sleep(50)
  }
}

type Signature = Readonly<{ args: readonly ("i32" | "u32" | "cstring")[]; returns: "i32" }>

const libraries = new Map<string, { symbols: Record<string, (...words: unknown[]) => number> }>()

/** Functions of the C library that Bun has no binding for. */
function openLibrary(functions: Readonly<Record<string, Signature>>): {
  symbols: Record<string, (...words: unknown[]) => number>
} {
  const key = Object.keys(functions).join(" ")
  const open = libraries.get(key) ?? loadLibrary(functions)
  libraries.set(key, open)
  return open
}

function loadLibrary(functions: Readonly<Record<string, Signature>>): {
  symbols: Record<string, (...words: unknown[]) => number>
} {
  const { dlopen } = require("bun:ffi") as typeof import("bun:ffi")
  const names = process.platform === "darwin" ? ["libSystem.B.dylib"] : ["libc.so.6", "libc.so"]
  for (const [at, name] of names.entries()) {
    try {
      return dlopen(name, functions as never) as never
    } catch (error) {
      if (at === names.length - 1) throw error
    }
  }
  throw new Error("unreachable")
}

const AT_FDCWD = process.platform === "darwin" ? -2 : -100
const EXCHANGE = 2

/**
 * Exchanges two names in one step: renameat2 with RENAME_EXCHANGE on Linux, renameatx_np with RENAME_SWAP on macOS.
 * Answers false where that fails: a name is gone, or the file system cannot.
 */
function exchange(a: string, b: string): boolean {
  const { ptr } = require("bun:ffi") as typeof import("bun:ffi")
  const name = process.platform === "darwin" ? "renameatx_np" : "renameat2"
  const { symbols } = openLibrary({
    [name]: { args: ["i32", "cstring", "i32", "cstring", "u32"], returns: "i32" },
  })
  return symbols[name]!(AT_FDCWD, ptr(buffer(`${a}\0`)), AT_FDCWD, ptr(buffer(`${b}\0`)), EXCHANGE) === 0
}

/** A word for people: control characters escaped, so that no name can write to the terminal. */
export function shown(word: string): string {
  // Also what is invisible or turns the direction of writing.
  // eslint-disable-next-line no-control-regex
  const unprintable = /[\u0000-\u001f\u007f-\u009f\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff]/g
  return word.replace(unprintable, (character) => {
    const code = character.charCodeAt(0).toString(16)
    return code.length > 2 ? `\\u${code.padStart(4, "0")}` : `\\x${code.padStart(2, "0")}`
  })
}

const shortened = (word: string): string => (word.length > 60 ? `${word.slice(0, 60)}…` : word)

/** A word for any POSIX shell. Only for bash here and for printed lines: the other side's login shell may be fish. */
export function shellQuote(word: string): string {
  return /^[\w./:@+,%-][\w./:@+=,%-]*$/.test(word) ? word : `'${word.replaceAll("'", `'\\''`)}'`
}

/** Text without passwords and tokens in the addresses that it names. */
export function withoutSecret(text: string): string {
  return text
    .replace(/\b((?:[a-z+]+\+)?https?:\/\/)[^\s/@'"]+@/g, "$1***@")
    .replace(/\b([a-z][a-z0-9+.-]*:\/\/[^\s/:@'"]+):[^\s/@'"]+@/g, "$1:***@")
    .replace(/([?&](?:access_token|private_token|token|password)=)[^\s&#'"]+/g, "$1***")
}

/** A command for people, as a shell line: also without the values of secret settings. */
function shownCommand([program, ...words]: readonly string[]): string {
  const values = new Set(secretSettings(program!, words).map(({ indices }) => indices.at(-1)))
  const told = words.map((word, at) => (values.has(at) ? "…" : withoutSecret(word)))
  return shown([program!, ...told].map(shellQuote).join(" "))
}

/** An encoded word of a command for -vv: of a variable or a setting only its name. */
const secretLeftOut = (word: string): string =>
  /^[ce][\w-]+\\0/.test(word) ? `${word.slice(0, word.indexOf("\\"))}…` : word

const settingName = (line: string): string => line.split(" ", 1)[0]!

/** The candidate that a mistyped word is closest to, if it is close at all. */
export function nearest(word: string, candidates: readonly string[]): string | undefined {
  const distance = (a: string, b: string): number => {
    let row = [...Array(b.length + 1).keys()]
    for (let i = 1; i <= a.length; i++)
      row = row.reduce<number[]>(
        (next, above, j) => [
          ...next,
          j === 0 ? i : Math.min(above + 1, next[j - 1]! + 1, row[j - 1]! + (a[i - 1] === b[j - 1] ? 0 : 1)),
        ],
        [],
      )
    return row[b.length]!
  }
  const ranked = candidates
    .map((candidate) => ({ candidate, far: distance(word, candidate) }))
    .sort((a, b) => a.far - b.far)
  return ranked[0] && ranked[0].far <= Math.max(2, word.length / 3) ? ranked[0].candidate : undefined
}

/** Prints to stdout what the user asked edict itself for. */
function print(output: string): number {
  process.stdout.write(output)
  return 0
}

/** Says something on stderr, with our name before it. */
function say(message: string): void {
  process.stderr.write(`edict: ${message}\n`)
}

/** The same of what came home: on a terminal the closing line tells it. */
function noteHome(context: Context, message: string): void {
  if (context.steps.settles) context.report.notes.push(message)
  else note(context, message)
}

function note(context: Context, message: string): void {
  context.report.notes.push(message)
  if (context.plan.options.verbosity >= 0) context.steps.say(message)
}

/** A command that has ended, or, without a time, one that has begun and is talked to. */
type Started = Readonly<{ argv: readonly string[]; milliseconds?: number }>

/** How the agent, whose script is long, is called in a trace. */
const AGENT = "<agent>"

/** Where each command that this program starts, and each request to the agent, is heard of. */
const COMMANDS = diagnostics.channel("edict.commands")

function publishCommand(argv: readonly string[], milliseconds?: number): void {
  if (COMMANDS.hasSubscribers) COMMANDS.publish({ argv, milliseconds } satisfies Started)
}

/** A pipeline with a short word for each script in it. */
function withoutScripts(line: string): string {
  const inside = (script: string) => shellQuote(script).slice(1, -1)
  return line
    .replaceAll(inside(SEND_SCRIPT), "<pack>")
    .replaceAll(inside(encodeScript(UNPACK_SCRIPT)), "<unpack>")
    .replaceAll(inside(BOOT_LINE), AGENT)
}

/** `-v`: says each command as a shell line, with its time; scripts as one word. */
function traceCommands(options: Options, steps: Steps): { stop: () => void } {
  const take = (message: unknown) => {
    const { argv, milliseconds } = message as Started
    const isAgent = (word: string) => word === BOOT_LINE || word === AGENT
    const words = argv.map((word) => (isAgent(word) ? AGENT : shellQuote(withoutScripts(word))))
    const time = milliseconds === undefined ? "" : `   # ${(milliseconds / 1000).toFixed(2)} s`
    steps.say(`+ ${shown(words.join(" "))}${time}`)
  }
  if (options.verbosity > 0) COMMANDS.subscribe(take)
  return { stop: () => void COMMANDS.unsubscribe(take) }
}

/** What --report says, while it is not written: of one host, or of several. */
type Reporter = { readonly report: Report; several?: () => unknown; readonly write: () => void }

/** The report of a run that has not begun. Throws EdictError if it could not be written in the end. */
function openReporter({ options, host }: Invocation): Reporter {
  const file = options.action === "run" ? options.report : undefined
  if (file !== undefined) checkReport(file)
  const report: Report = {
    host: host ?? "",
    exitCode: EDICT_FAILED,
    milliseconds: 0,
    stages: [],
    bytesUp: 0,
    bytesDown: 0,
    resultLinks: [],
    changed: [],
    refs: [],
    conflicts: [],
    notes: [],
  }
  const reporter: Reporter = {
    report,
    write: () => {
      report.milliseconds = Math.round(performance.now())
      if (file !== undefined) writeReport(file, reporter.several?.() ?? report)
    },
  }
  return reporter
}

/** Takes what edict failed for into the report. */
function noteFailure(report: Report, thrown: unknown): void {
  const error = mendable(thrown)
  report.exitCode = error instanceof EdictError ? error.exitCode : EDICT_FAILED
  report.error ??= error instanceof EdictError ? error.message : String(error)
}

/** Throws EdictError if a report cannot be written to this file: tried with an empty one beside it. */
function checkReport(file: string): void {
  try {
    if (reportPlace(file) === "in place") fs.accessSync(file, fs.constants.W_OK)
    else replaceReport(file, "try")
  } catch (error) {
    const directory = path.dirname(file)
    throw new EdictError(
      `the report cannot be written to ${shown(file)}: ${reason(error)}`,
      fs.existsSync(directory) ? "another --report FILE" : `mkdir -p ${shellQuote(shown(directory))}`,
    )
  }
}

function writeReport(file: string, content: unknown): void {
  const json = `${JSON.stringify(content, null, 2)}\n`
  try {
    if (reportPlace(file) === "in place") fs.writeFileSync(file, json, { flag: "a" })
    else replaceReport(file, { json })
  } catch (error) {
    throw new EdictError(`the report could not be written to ${shown(file)}: ${reason(error)}`)
  }
}

/** Pipes, devices and open files (/dev/stdout, >(program) of bash) are written to; a file is replaced as a whole. */
function reportPlace(file: string): "in place" | "beside" {
  const stat = fs.statSync(file, { throwIfNoEntry: false })
  const isOpenFile = /^\/(dev|proc)\//.test(path.resolve(file))
  return stat !== undefined && !stat.isDirectory() && (isOpenFile || !stat.isFile()) ? "in place" : "beside"
}

/** Replaces a file, behind links, in one step by one with this content; or only sees whether that would work. */
function replaceReport(file: string, what: "try" | { json: string }): void {
  const old = fs.statSync(file, { throwIfNoEntry: false })
  if (old?.isDirectory()) throw new Error("it is a directory")
  if (old) fs.accessSync(file, fs.constants.W_OK)
  const target = old ? fs.realpathSync(file) : path.resolve(file)
  const temporary = path.join(path.dirname(target), `.${path.basename(target)}.${randomName().slice(0, 8)}`)
  try {
    fs.writeFileSync(temporary, what === "try" ? "" : what.json, { flag: "wx", mode: old?.mode ?? 0o666 })
    if (what !== "try") fs.renameSync(temporary, target)
  } finally {
    fs.rmSync(temporary, { force: true })
  }
}

/** Something that is being done, and since when by performance.now(). */
export type Step = Readonly<{ label: string; since: number }>

/** How long the line on the terminal must not show, at the longest. */
type Hold = "always" | "until bytes flow"

/**
 * The one line on the terminal that says what is being done. It goes before anything else is written there, and does
 * not show while the terminal is the command's, or a password may be asked for on it. Without a terminal, with -q,
 * NO_COLOR or TERM=dumb there is none, and all else is plain text.
 */
export type Steps = Readonly<{
  settles: boolean // whether one line at the end says what came home
  moves: boolean // whether there is a line until then
  begin: (label: string) => () => void // the answer ends the step
  count: (line: string) => void // how far a transfer is; "" when it has ended
  tick: () => void // for work that lets no timer in
  hold: (how: Hold) => () => void // the answer lets go
  lend: () => () => void // the terminal is the command's until the answer is called
  say: (message: string) => void
  end: () => void
}>

/** Milliseconds after which a step shows, and between two looks at it. */
const STEP_SHOWS = 300
const STEP_RENEWS = 150

/** The line for a run with these options on the terminal behind stderr, if there is one. */
export function openSteps(options: Pick<Options, "verbosity">, env: Env): Steps {
  const look = lookOfSteps(options, env)
  const screen = openScreen(look)
  const active = new Set<Step>()
  const holds = new Set<{ how: Hold }>()
  let counted = ""
  let timer: ReturnType<typeof setInterval> | undefined
  const draw = () => {
    const isHeld = [...holds].some(({ how }) => how === "always" || counted === "")
    screen.show(isHeld ? "" : counted || stepLine([...active], performance.now()))
  }
  const follow = () => {
    draw()
    if (active.size > 0 && look === "moving") timer ??= setInterval(draw, STEP_RENEWS)
    else timer = void clearInterval(timer)
  }
  const hold = (how: Hold) => enter(holds, { how }, draw)
  return {
    settles: look !== "plain",
    moves: look === "moving",
    begin: (label) => enter(active, { label, since: performance.now() }, follow),
    count: (line) => {
      counted = line
      draw()
    },
    tick: draw,
    hold,
    lend: () => {
      const release = hold("always")
      screen.lend()
      return () => {
        screen.takeBack()
        release()
      }
    },
    say: (message) => {
      screen.say(message)
      draw()
    },
    end: () => {
      active.clear()
      counted = ""
      follow()
    },
  }
}

/** Adds something to a set until the answer is called; `changed` hears of both. */
function enter<T>(all: Set<T>, one: T, changed: () => void): () => void {
  all.add(one)
  changed()
  return () => {
    all.delete(one)
    changed()
  }
}

/** What stderr is to look like: lines that come and go, a terminal that keeps what is written, or no terminal. */
type Screen = "moving" | "settled" | "plain"

function lookOfSteps({ verbosity }: Pick<Options, "verbosity">, env: Env): Screen {
  if (verbosity < 0 || !isTerminal(2) || (env.TERM || "dumb") === "dumb") return "plain"
  return env.NO_COLOR ? "settled" : "moving"
}

/** The terminal behind stderr, and what is on its last line. */
function openScreen(look: Screen) {
  let shows = ""
  let cursor: "at the start" | "anywhere" | "not ours" = "at the start"
  const columns = () => process.stderr.columns || 80
  // Where the last line of the command has no end this moves on to the next one; else nothing is to be seen of it.
  const freshLine = () => {
    if (cursor !== "at the start" && look === "moving") putOnTerminal(`${" ".repeat(columns())}\r`)
    if (cursor === "anywhere") cursor = "at the start"
  }
  const show = (line: string) => {
    const cut = line.slice(0, columns() - 1)
    if (cut === shows || look !== "moving" || (cut !== "" && isInBackground())) return
    if (cut !== "") freshLine()
    putOnTerminal(`\r\x1b[K${cut}`)
    shows = cut
  }
  return {
    show,
    lend: () => void (cursor = "not ours"),
    takeBack: () => void (cursor = "anywhere"),
    say: (message: string) => {
      show("")
      freshLine()
      // With a terminal of its own over there the command has this one without translation of line ends.
      if (cursor === "not ours" && look !== "plain") putOnTerminal(`edict: ${message}\r\n`)
      else say(message)
    },
  }
}

/** "edict: results from h, sync back from h, 3 s": what has been going on for long enough to be told; else "". */
export function stepLine(active: readonly Step[], now: number): string {
  const due = active.filter(({ since }) => now - since >= STEP_SHOWS)
  if (due.length === 0) return ""
  const seconds = Math.floor((now - Math.min(...due.map(({ since }) => since))) / 1000)
  return `edict: ${due.map(({ label }) => label).join(", ")}${seconds > 0 ? `, ${duration(seconds).replace(".0 s", " s")}` : ""}`
}

/** Writes to the terminal at once: what follows may come from another process. */
function putOnTerminal(output: string): void {
  try {
    fs.writeSync(2, output)
  } catch {
    // it is gone, or full
  }
}

/** Whether the terminal belongs to another job of the user's shell. */
function isInBackground(): boolean {
  const { symbols } = openLibrary({
    tcgetpgrp: { args: ["i32"], returns: "i32" },
    getpgrp: { args: [], returns: "i32" },
  })
  const inFront = symbols.tcgetpgrp!(2)
  return inFront > 0 && inFront !== symbols.getpgrp!()
}

/** How far a transfer is: read() gets what the counter says, until end(). */
type Progress = Readonly<{
  counter?: string[]
  read: (chunk: string, before?: number) => void // what the counter says, and how many bytes came before it began
  end: () => void
}>

/**
 * Progress through a stream of things with these sizes (bytes): told after a second, only on a terminal, and counted
 * by dd in the pipeline (GNU dd's status=progress), so that no byte passes through this program.
 */
async function startProgress(context: Context, what: string, sizes: readonly number[]): Promise<Progress> {
  const wanted = context.steps.moves && (await capture(["dd", "--version"], "may-fail")).includes("coreutils")
  if (!wanted) return { read: () => undefined, end: () => undefined }
  const total = sum(sizes)
  const began = performance.now()
  const read = (chunk: string, before = 0) => {
    // dd: "1048576 bytes (1.0 MB, 1.0 MiB) copied, …"; rsync --info=progress2: "  1,048,576  10%  1.00MB/s …"
    const last =
      chunk
        .trimEnd()
        .split(/[\r\n]/)
        .at(-1) ?? ""
    const counted = Number(
      (/^(\d+) bytes/.exec(last) ?? /^\s*([\d,]+)\s+\d+%/.exec(last))?.[1]?.replaceAll(",", "") ?? NaN,
    )
    const seconds = (performance.now() - began) / 1000
    if (Number.isNaN(counted) || seconds < 1) return
    context.steps.count(progressLine(what, { sizes, total, done: before + counted, seconds }))
  }
  return {
    counter: ["dd", "bs=256k", "status=progress"],
    read,
    end: () => context.steps.count(""),
  }
}

/** "edict: 12 of 80 store paths, 34.5 of 102.0 MiB, 11.2 MiB/s, 6 s left". */
export function progressLine(
  what: string,
  at: { sizes: readonly number[]; total: number; done: number; seconds: number },
): string {
  const { sizes, total, done, seconds } = at
  const mebi = (count: number) => (count / 2 ** 20).toFixed(1)
  const rate = done / seconds
  let upTo = 0
  const finished = sizes.filter((size) => (upTo += size) <= done).length
  const left = rate > 0 && total > done ? `, ${Math.ceil((total - done) / rate)} s left` : ""
  return `edict: ${finished} of ${sizes.length} ${what}, ${mebi(Math.min(done, total || done))} of ${mebi(total)} MiB, ${mebi(rate)} MiB/s${left}`
}

/** The packages that edict imports, as bun.lock has them. */
export const PACKAGES = { "@iarna/toml": "3.0.0", minimist: "1.2.8", zx: "8.8.5" } as const

/**
 * Imports a package, or a `module` of it. A compiled edict has it inside, and a checkout in node_modules. For a script
 * that lies alone Bun fetches it (docs: runtime/auto-install): of a bare name the latest version, whatever package.json
 * says, and ranges fail (Bun 1.4), so an exact one is named. Throws EdictError if it cannot be had.
 */
async function load<T>(name: keyof typeof PACKAGES, inside: () => Promise<T>, module = ""): Promise<T> {
  if (!import.meta.path.endsWith(".ts")) return await inside()
  const upwards = import.meta.dir.split("/").map((_, depth, all) => all.slice(0, depth + 1))
  const places = upwards.map((names) => [...names, "node_modules"].join("/"))
  if (places.some((place) => fs.existsSync(`${place}/${name}`))) return await inside()
  const wanted = `${name}@${PACKAGES[name]}`
  try {
    return (await import(wanted + module)) as T
  } catch (error) {
    // In a directory with node_modules, its own or one further up, Bun fetches only if it is told to.
    const hint = places.some((place) => fs.existsSync(place))
      ? `bun --install=fallback ${shellQuote(import.meta.path)}, or bun install where it lies`
      : "see that the registry of npm packages can be reached, or take a compiled edict"
    throw new EdictError(`Bun cannot fetch ${wanted}: ${reason(error)}`, hint)
  }
}

const reason = (error: unknown): string => (error instanceof Error ? shown(error.message) : String(error))

/** Who said it: ssh on its way to a host, a step of edict, or the command over there. */
export type Speaker = "ssh" | "step" | "command"
type KnownHost = Pick<Host, "name" | "destination"> &
  Partial<Pick<Host, "sshOptions" | "sendInputs" | "knownHosts">>
type Where = "here" | "there" | "here or there"

/** One thing that users get stuck at. */
type Trouble = Readonly<{
  by: readonly Speaker[]
  pattern: RegExp // of one line, without colours
  marks?: readonly string[] // words in every line of a command that `pattern` finds, which no colour divides
  means?: (scene: Scene) => string // in other words, for what a command says
  remedy: (scene: Scene) => string
  always?: true // told even if the command ended well
}>
type Scene = Readonly<{ host: KnownHost; where: Where; found: readonly (string | undefined)[] }>

/** A line that is known, and what to do about it. */
export type Explanation = Readonly<{ line: string; means: string; remedy: string; always: boolean }>

const tableOf = (name: string): string => `[hosts.${/^[\w-]+$/.test(name) ? name : JSON.stringify(name)}]`
const hostAt = (where: Where, { name }: KnownHost): string =>
  ({ here: "here", there: `on ${name}`, "here or there": `on ${name} or here` })[where]

/** How a host gets at an input that it may not, or cannot, fetch by itself. */
const otherWay = ({ host }: Scene, way: "by ssh" | "otherwise"): string => {
  const lent =
    way === "by ssh" && !host.sshOptions?.includes("-A") ? "-A, which lends it your ssh agent; or " : ""
  return host.sendInputs
    ? `${lent}nix flake lock here, first: send-inputs sends what flake.lock has`
    : `${lent}send-inputs = true in ${tableOf(host.name)}, which fetches locked inputs here and sends them`
}

/** What ssh says when it does not get there (OpenSSH 9.2 to 10). */
const SSH_TROUBLES: readonly Trouble[] = [
  {
    by: ["ssh"],
    pattern: /Could not resolve hostname|Name or service not known/,
    remedy: () => "check the name, or give it an address in ssh_config or the host config",
  },
  {
    by: ["ssh"],
    pattern: /Host key for (\S+) has changed/,
    remedy: ({ host, found }) => {
      const forget = host.knownHosts
        ? "put the new key into the machines file"
        : `ssh-keygen -R ${shellQuote(found[1]!)} && ssh ${host.destination} true`
      return `if you know why it changed (otherwise somebody may stand in between): ${forget}`
    },
  },
  {
    by: ["ssh"],
    pattern: /Host key verification failed|REMOTE HOST IDENTIFICATION HAS CHANGED/,
    remedy: ({ host }) => `ssh ${host.destination} true   # and look at what it says about the key`,
  },
  {
    by: ["ssh"],
    pattern: /Too many authentication failures/,
    remedy: ({ host }) =>
      `edict -o IdentitiesOnly=yes -i KEY ${host.name} …   # it was offered too many keys`,
  },
  {
    by: ["ssh"],
    pattern: /Permission denied/,
    remedy: ({ host }) => `ssh ${host.destination} true   # must work first; see ssh-copy-id`,
  },
  {
    by: ["ssh"],
    pattern: /Session open refused by peer|channel \d+: open failed/,
    remedy: ({ host }) => `MaxSessions 10 in sshd_config on ${host.name}: it allows no session, or too few`,
  },
  {
    by: ["ssh"],
    pattern: /timed out|No route|refused|unreachable|Connection (reset|closed)/,
    remedy: ({ host }) => `ssh -v ${host.destination} true   # is it up, is the port right?`,
  },
  {
    by: ["command"],
    pattern: /session request failed: Session open refused by peer/,
    marks: ["Session open refused by peer"],
    means: ({ host }) => `${host.name} takes too few sessions in one connection, so steps connect anew`,
    remedy: ({ host }) => `MaxSessions 10 in sshd_config on ${host.name}`,
    always: true,
  },
]

/** What Nix says, from 2.8 to 2.34, and the programs that it starts. The first that fits is the cause. */
const NIX_TROUBLES: readonly Trouble[] = [
  {
    by: ["step", "command"],
    // The last one is GNU tar's word for a write that ended half-way.
    pattern:
      /No space left on device|Disk quota exceeded|database or disk is full|: Wrote only \d+ of \d+ bytes/,
    marks: ["No space left on device", "Disk quota exceeded", "database or disk is full"],
    means: ({ host }) => `no space left on ${host.name}`,
    remedy: ({ host, where }) =>
      where === "there"
        ? `free some space on ${host.name}: ssh ${host.destination} nix-collect-garbage, or edict --clean ${shellQuote(host.name)}`
        : `free some space ${hostAt(where, host)}`,
  },
  {
    by: ["step"],
    pattern: /lacks a (valid signature|signature by a trusted key)/,
    remedy: () =>
      "the store here refuses unsigned paths of this user: sign them on the host by a key that is in trusted-public-keys here, or leave the result there (--no-link)",
  },
  {
    by: ["command"],
    pattern: /cannot add path '([^']+)' because it lacks a (valid signature|signature by a trusted key)/,
    marks: ["because it lacks a "],
    means: ({ host }) => `a store that ${host.name} writes to takes only signed paths from your user there`,
    remedy: () =>
      "sign them where they were built (nix store sign --key-file FILE), with the public key in trusted-public-keys of the store that refuses. Its trusted users could say --no-check-sigs, but being one is the same as root there",
  },
  {
    by: ["command"],
    pattern: /experimental Nix feature '([^']+)' is disabled/,
    marks: ["experimental Nix feature"],
    means: ({ host, found }) => `Nix on ${host.name} has ${found[1]} turned off`,
    remedy: ({ host, found }) =>
      `--extra-experimental-features ${found[1]}, or extra-experimental-features = ${found[1]} in /etc/nix/nix.conf on ${host.name} (what edict turns on does not get past sudo)`,
  },
  {
    by: ["step", "command"],
    pattern:
      /repository path '([^']+)' is not owned by current user|dubious ownership in repository at '([^']+)'|unsafe repository \('([^']+)' is owned by someone else\)/,
    marks: ["is not owned by current user", "dubious ownership in repository", "is owned by someone else"],
    means: ({ host, found }) =>
      `${found[1] ?? found[2] ?? found[3]} belongs to another user on ${host.name}, and git will not read it`,
    remedy: ({ host, found }) =>
      `ssh ${host.destination} git config --global --add safe.directory ${shellQuote(found[1] ?? found[2] ?? found[3]!)}   # or chown it`,
  },
  {
    by: ["command"],
    pattern: /warning: Not a git repository\. Use --no-index to compare/, // Nix 2.8 hides git's own words
    marks: ["Not a git repository. Use --no-index"],
    means: ({ host }) => `git on ${host.name} will not read a repository, most likely of another user there`,
    remedy: ({ host }) =>
      `ssh ${host.destination} git config --global --add safe.directory PATH   # or chown it`,
  },
]

/** What it says of systems: `a 'S' with features {F} is required …` up to 2.26 or later, several lines since then. */
const SYSTEM_TROUBLES: readonly Trouble[] = [
  {
    by: ["command"],
    pattern:
      /a '([^']+)' with features \{([^}]*)\} is required to build '[^']*', but I am a '([^']+)' with features/,
    marks: ["is required to build"],
    means: ({ host, found }) =>
      found[1] === found[3]
        ? `${host.name} lacks one of the system features ${found[2]}`
        : `this is for ${found[1]}, and ${host.name} is a ${found[3]}`,
    remedy: ({ found }) =>
      found[1] === found[3] ? pickBy("features", found[2]!) : pickBy("system", found[1]!),
  },
  {
    by: ["command"],
    pattern: /^ *Required system: '([^']+)'/,
    marks: ["Required system: "],
    means: ({ host, found }) => `this is for ${found[1]}, and ${host.name} is something else`,
    remedy: ({ found }) => pickBy("system", found[1]!),
  },
  {
    by: ["command"],
    pattern: /^ *Required features: \{([^}]*)\}/,
    marks: ["Required features: "],
    means: ({ host, found }) => `${host.name} lacks one of the system features ${found[1]}`,
    remedy: ({ found }) => pickBy("features", found[1]!),
  },
]

const pickBy = (need: "system" | "features", what: string): string =>
  `edict --pick --${need} ${what.replaceAll(", ", ",")} @all …, or name a fitting host; its own builders would do, too`

/** What it says when an input cannot be fetched; git and ssh over there speak first. */
const INPUT_TROUBLES: readonly Trouble[] = [
  {
    by: ["command"],
    pattern: /API rate limit exceeded|secondary rate limit|HTTP error 429/,
    marks: ["API rate limit exceeded", "secondary rate limit", "HTTP error 429"],
    means: ({ host }) => `${host.name} has asked too often for a visitor without a name (rate limit)`,
    remedy: (scene) =>
      `access-tokens = github.com=TOKEN in ~/.config/nix/nix.conf on ${scene.host.name}; or ${otherWay(scene, "otherwise")}`,
  },
  {
    by: ["command"],
    pattern: /Host key verification failed\./,
    marks: ["Host key verification failed."],
    means: ({ host }) => `${host.name} does not know the host key of the server that an input lies on`,
    remedy: (scene) =>
      `ssh-keyscan SERVER >>~/.ssh/known_hosts on ${scene.host.name}, if the key is the right one; or ${otherWay(scene, "otherwise")}`,
  },
  {
    by: ["command"],
    pattern: /Permission denied \([a-z,-]*(publickey|password)[a-z,-]*\)/,
    marks: ["Permission denied ("],
    means: ({ host }) => `${host.name} has no key for the server that an input lies on`,
    remedy: (scene) => otherWay(scene, "by ssh"),
  },
  {
    by: ["command"],
    pattern:
      /unable to download '[^']*': HTTP error 40[134]|The requested URL returned error: 40[134]|could not read (Username|Password) for '|^fatal: repository '[^']*' not found/,
    marks: ["HTTP error 40", "URL returned error: 40", "could not read ", "fatal: repository '"],
    means: ({ host }) => `${host.name} has no token or password for an input, or the input is not there`,
    remedy: (scene) =>
      `${otherWay(scene, "otherwise")}; or access-tokens or netrc-file in ~/.config/nix/nix.conf on ${scene.host.name}`,
  },
  {
    by: ["command"],
    pattern:
      /^ssh: (Could not resolve|connect to)|^fatal: unable to access '.*(resolve|connect)|error: unable to download '.*: .*(resolve|connect|Timeout)/,
    marks: ["ssh: Could not resolve", "ssh: connect to", "fatal: unable to access", "unable to download "],
    means: ({ host }) => `${host.name} does not reach a server that it needs`,
    remedy: (scene) => `if an input lies there: ${otherWay(scene, "otherwise")}`,
  },
  {
    by: ["command"],
    pattern: /'([^']+)' does not appear to be a git repository|Git repository "([^"]+)" does not exist/,
    marks: ["does not appear to be a git repository", "Git repository "],
    means: ({ host, found }) => `there is no repository ${found[1] ?? found[2]} on ${host.name}`,
    remedy: (scene) => `if it is the input of a flake: ${otherWay(scene, "otherwise")}`,
  },
]

/** What it says last of all: git's words for every failure of ssh. */
const REPOSITORY_TROUBLE: Trouble = {
  by: ["command"],
  pattern: /^(fatal: Could not read from remote repository|ERROR: Repository not found)/,
  marks: ["fatal: Could not read from remote repository", "ERROR: Repository not found"],
  means: ({ host }) => `${host.name} may not read the repository of an input`,
  remedy: (scene) => otherWay(scene, "by ssh"),
}

/** What it says of the machine that it is on, and of what it was not allowed. */
const MACHINE_TROUBLES: readonly Trouble[] = [
  {
    by: ["command"],
    pattern: /executing ['"]?git['"]?: No such file or directory/,
    marks: ["executing "],
    means: ({ host }) => `no git on ${host.name}, and Nix needs it there`,
    remedy: ({ host }) => `install git there, e.g. ssh ${host.destination} nix profile install nixpkgs#git`,
  },
  {
    by: ["step", "command"],
    pattern: /cannot connect to socket at '([^']+)'/,
    marks: ["cannot connect to socket at"],
    means: ({ host }) => `the Nix daemon on ${host.name} does not run`,
    remedy: ({ host, where }) =>
      where === "there" ? `systemctl start nix-daemon on ${host.name}` : "systemctl start nix-daemon",
  },
  {
    by: ["command"],
    pattern:
      /opening lock file ['"]\/nix\/var\/[^'"]*['"]: Permission denied|could not set permissions on '\/nix\/var\/[^']*'/,
    marks: ["opening lock file ", "could not set permissions on"],
    means: ({ host }) => `your user on ${host.name} may not write to its store, and no Nix daemon does it`,
    remedy: ({ host }) =>
      `systemctl start nix-daemon on ${host.name}; or as the user whom the store belongs to: edict USER@${host.destination.replace(/^.*@/, "")} …`,
  },
  {
    by: ["step", "command"],
    pattern:
      /sudo: (a terminal is required|a password is required|no tty present|sorry, you must have a tty)/,
    marks: ["sudo: "],
    means: ({ host }) => `sudo on ${host.name} asks for a password, and has no terminal to ask on`,
    remedy: ({ host, where }) =>
      where === "there"
        ? `edict --tty ${shellQuote(host.name)} …, or NOPASSWD in sudoers on ${host.name}`
        : "sudo -v, and the same again; or NOPASSWD in sudoers here for nix-store --import",
  },
  {
    by: ["step"],
    pattern:
      /\/bin\/sh: (?:.*: )?(\S+): (?:command )?not found|^zsh:\d+: command not found: (\S+)|^fish: Unknown command: (\S+)/,
    remedy: ({ host, found }) =>
      `install ${found[1] ?? found[2] ?? found[3]} on ${host.name}, or put it on the PATH of a non-interactive shell there`,
  },
  {
    by: ["step"],
    pattern: /is your shell clean\?/,
    remedy: ({ host }) =>
      `ssh ${host.destination} true   # must print nothing: see .bashrc and the like there`,
  },
  {
    by: ["command"],
    pattern: /unexpected EOF reading a line/,
    marks: ["unexpected EOF reading a line"],
    means: ({ host }) => `Nix on ${host.name} asked a question, and had nobody to answer`,
    remedy: () =>
      "--accept-flake-config if it was about the settings of a flake that you trust; or a terminal",
  },
  {
    by: ["command"],
    pattern: /ignoring untrusted flake configuration setting '([^']+)'/,
    marks: ["ignoring untrusted flake configuration setting"],
    means: ({ host, found }) =>
      `Nix on ${host.name} passed over settings of the flake (nixConfig), ${found[1]} for one`,
    remedy: ({ host }) =>
      `--accept-flake-config behind the command, if you trust the flake; or put them into nix.conf on ${host.name}`,
    always: true,
  },
  {
    by: ["command"],
    pattern: /ignoring untrusted substituter '([^']+)'/,
    marks: ["ignoring untrusted substituter"],
    means: ({ host, found }) =>
      `the store of ${host.name} lets your user there choose no substituter: ${found[1]} was not asked`,
    remedy: ({ host, found }) =>
      `trusted-substituters = ${found[1]} in /etc/nix/nix.conf on ${host.name}, and its key in trusted-public-keys. A trusted user there would do, too, but that is the same as root there`,
    always: true,
  },
  {
    by: ["command"],
    pattern: /ignoring the (?:client|user)-specified setting '([^']+)', because it is a restricted setting/,
    marks: ["because it is a restricted setting"],
    means: ({ host, found }) => `the store of ${host.name} does not let your user there set ${found[1]}`,
    remedy: ({ host, found }) =>
      `set ${found[1]} in /etc/nix/nix.conf on ${host.name}. A trusted user there could, too, but that is the same as root there`,
    always: true,
  },
]

const TROUBLES = [
  ...SSH_TROUBLES,
  ...NIX_TROUBLES,
  ...SYSTEM_TROUBLES,
  ...INPUT_TROUBLES,
  ...MACHINE_TROUBLES,
  REPOSITORY_TROUBLE,
]

/** Fixed words: a line of a command's that is explained has one of them. For grep -F. */
export const TROUBLE_MARKS: readonly string[] = TROUBLES.flatMap(({ marks }) => marks ?? [])

/** What a command goes on after, and no cause of its end. */
const HARMLESS = /^error \(ignored\): |^warning: (error|could not|unable|failed)|; retrying in /

/** A text without colours, line by line; what a terminal would overwrite is a line, too. */
const plainLines = (output: string): string[] =>
  lines(output.replace(/\x1b\[[0-9;?]*[A-Za-z]/g, "").replaceAll("\r", "\n"))

/**
 * What a text means in which somebody says why it does not work: a line for each cause that is known, the likeliest
 * first, and what to do. Nothing for a text that says nothing known. `where`: the side that a step failed on.
 */
export function explain(
  output: string,
  from: Readonly<{ by: Speaker; host?: KnownHost; where?: Where }>,
): Explanation[] {
  const { by, host = { name: "here", destination: "here" }, where = "there" } = from
  const said = plainLines(output).filter((line) => by !== "command" || !HARMLESS.test(line))
  return TROUBLES.filter((trouble) => trouble.by.includes(by)).flatMap((trouble) => {
    const found = said.find((text) => trouble.pattern.test(text))
    if (found === undefined) return []
    const line = withoutSecret(found)
    const named = (trouble.pattern.exec(line) ?? []).map((word) => word && shown(word))
    const scene = { host: { ...host, name: shown(host.name) }, where, found: named }
    const means = trouble.means?.(scene) ?? ""
    return [{ line: line.trim(), means, remedy: trouble.remedy(scene), always: trouble.always === true }]
  })
}

/** Takes lines that hold a mark, and keeps the first for each trouble, however many there are. */
type Ear = Readonly<{ hear: (chunk: string) => void; heard: () => string }>

function openEar(): Ear {
  const known = new Map<Trouble, string>()
  const listened = TROUBLES.filter(({ by }) => by.includes("command"))
  let rest = ""
  return {
    hear: (chunk) => {
      const whole = (rest + chunk).split("\n")
      rest = whole.pop()!.slice(0, LONGEST_LINE)
      for (const line of whole.flatMap((text) => plainLines(text.slice(0, LONGEST_LINE))))
        for (const trouble of HARMLESS.test(line) ? [] : listened)
          if (!known.has(trouble) && trouble.pattern.test(line)) known.set(trouble, line)
    },
    heard: () => [...known.values()].join("\n"),
  }
}

const LONGEST_LINE = 64 * 1024

/** Says what is known of the reason why the command failed, and what it was denied; its own words stand above. */
function explainOutcome(context: Context, exitCode: number): void {
  const { host } = context.plan
  const known = explain(context.ear.heard(), { by: "command", host })
  const [denied, causes] = partition(known, ({ always }) => always)
  const hasFailed = exitCode !== 0 && context.signal === undefined
  for (const { means, remedy } of [...(hasFailed ? causes.slice(0, 1) : []), ...denied])
    note(context, `${means}; try: ${remedy}`)
}

/** Something that the user can mend: what and why, what to type, and the exit code. */
export class EdictError extends Error {
  constructor(
    message: string,
    readonly hint: string = "",
    readonly exitCode: number = EDICT_FAILED,
  ) {
    super(message)
  }
}
export class UsageError extends EdictError {}
/** A tree over there is not as the manifest has it. */
class Unexpected extends EdictError {}

/** What the file system refuses is the user's to mend; all else that is no EdictError is a bug. */
function mendable(error: unknown): unknown {
  if (error instanceof EdictError || !(error instanceof Error) || !("syscall" in error)) return error
  const { code } = error as NodeJS.ErrnoException
  const isFull = code === "ENOSPC" || code === "EDQUOT"
  return new EdictError(
    reason(error),
    isFull ? "free some space here" : "see that this path is one, and yours to write",
  )
}

/** One line for an error; a bug keeps its stack. Answers the exit code. */
export function tell(thrown: unknown, through: Pick<Steps, "say"> = { say }): number {
  const error = mendable(thrown)
  if (!(error instanceof EdictError)) {
    process.stderr.write(`edict: this is a bug: ${error instanceof Error ? error.stack : String(error)}\n`)
    return EDICT_FAILED
  }
  through.say(`${error.message}${error.hint ? `; try: ${error.hint}` : ""}`)
  return error.exitCode
}

if (import.meta.main) process.exitCode = await main(process.argv.slice(2)).catch(tell)
