/**
 * bun run bench [--quick] [--only NAME]… [--json]: edict beside the obvious script, Nix's own ways and plain ssh, on
 * machines of the lab behind a slow network; prints Markdown.
 *
 * Whatever is compared runs in turns (A B A B …), so that a machine that gets slower does so for all; ratios are
 * taken turn by turn. Every figure is a median with its minimum and maximum. Nothing here asserts a time.
 */

import { existsSync, mkdirSync, readFileSync, readlinkSync, writeFileSync } from "node:fs"
import { randomBytes } from "node:crypto"
import { constants, cpus, loadavg, release, totalmem } from "node:os"
import { join } from "node:path"
import { GIT_INIT, SYSTEM, writeFiles } from "./lab/flake"
import { REPOSITORY, startClient, startHost, type Client, type Host, type Running } from "./lab/lab"
import { EDICT } from "./support"

// ── Sizes ───

type Sizes = {
  /** Round-trip times in milliseconds. */
  rtts: number[]
  /** Turns; slow peers take fewer. */
  turns: number
  slowTurns: number
  /** Paths of the larger closure. */
  closure: number
  chain: number
  /** Bytes of the big result. */
  big: number
  /** Files of the large tree, and their directories. */
  files: number
  directories: number
}

const FULL: Sizes = {
  rtts: [0, 20, 50, 100],
  turns: 5,
  slowTurns: 3,
  closure: 200,
  chain: 20,
  big: 1_000_000_000,
  files: 50_000,
  directories: 24_000,
}

const QUICK: Sizes = {
  ...FULL,
  rtts: [0, 50],
  turns: 2,
  slowTurns: 1,
  closure: 50,
  big: 100_000_000,
  files: 10_000,
  directories: 4_800,
}

/** The link of closure and chain. */
const FAR = { name: "h50", rtt: 50 }
/** A host without the proxy in between, which could not carry the bytes fast enough. */
const NEAR = "near"

/** What the larger upload changes. */
const ASSETS = { files: 100, bytes: 32 << 10 }

// ── The lab ───

type Lab = {
  sizes: Sizes
  client: Client
  hosts: Map<string, Host>
  /** Milliseconds of every measured run, by what was measured. */
  samples: Map<string, number[]>
  /** When edict last talked to a host: its connection stays open for a minute. */
  lastUse: Map<string, number>
}

/** All that were started, or are about to be. */
const machines = new Set<Promise<Client | Host>>()

/** Starts the client and the hosts that these sections need. */
async function startLab(sizes: Sizes, sections: readonly Section[]): Promise<Lab> {
  const names = new Set(sections.flatMap((section) => section.hosts(sizes)))
  const started = await Promise.all([...names].map(startNamed))
  await haltIfStopping()
  const client = await keep(startClient({ hosts: started, flakes: true }))
  const hosts = new Map(started.map((host) => [host.name, host]))
  const lab: Lab = { sizes, client, hosts, samples: new Map(), lastUse: new Map() }
  for (const name of names) await connect(lab, name)
  return lab
}

async function startNamed(name: string): Promise<Host> {
  const delay = name === NEAR ? {} : { delay: Number(name.slice(1)) / 2 }
  return keep(startHost({ name, flakes: true, ...delay }))
}

function keep<T extends Client | Host>(machine: Promise<T>): Promise<T> {
  machines.add(machine)
  return machine
}

async function stopLab(): Promise<void> {
  await Promise.allSettled([...machines].map(async (machine) => (await machine).stop()))
}

const hostOf = (rtt: number): string => `h${rtt}`

/** The shared connection of all that is not edict. */
const SHARED = "-o ControlMaster=auto -o ControlPersist=yes -o ControlPath=/tmp/peer-%C"
const NAIVE = join(REPOSITORY, "tests/bench/naive.sh")

/** Opens the shared connection; it stays open as long as the client. */
async function connect(lab: Lab, host: string): Promise<void> {
  await quietly(lab.client, `ssh ${SHARED} ${host} true >/dev/null 2>&1`)
}

/** Writes the flake into a directory of a machine and commits it. */
async function makeProject(lab: Lab, machine: Client | Host, directory: string): Promise<void> {
  const { closure, chain, big } = lab.sizes
  const outside = machine.outside(directory)
  writeFiles(outside, {
    "flake.nix": readFileSync(join(import.meta.dir, "bench/flake.nix"), "utf8"),
    "settings.json": JSON.stringify({ system: SYSTEM, closure, chain, big }),
    "salt.txt": salt(),
    ".gitignore": "result\n",
  })
  writeAssets(outside)
  await quietly(machine, `git config --global user.name b; git config --global user.email b@example.org`)
  await quietly(machine, `cd ${directory} && git init -q && ${GIT_INIT}`)
}

/** A small text that nobody has seen. */
const salt = (): string => `${randomBytes(8).toString("hex")}\n`

function writeAssets(outside: string): void {
  mkdirSync(join(outside, "assets"), { recursive: true })
  for (let n = 0; n < ASSETS.files; n++)
    writeFileSync(join(outside, `assets/${n}`), randomBytes(ASSETS.bytes))
}

/** Runs a script whose time does not matter. */
async function quietly(machine: Client | Host, script: string, cwd?: string): Promise<string> {
  const { code, stdout, stderr } = await machine.sh(script, { timeout: 300_000, ...(cwd ? { cwd } : {}) })
  if (code !== 0) throw new Error(`${script}: exit code ${code}: ${lastWords(stdout + stderr)}`)
  return stdout.trimEnd()
}

/** The last line of an output, short enough for a table. */
function lastWords(output: string): string {
  return (output.trim().split("\n").at(-1) ?? "").slice(0, 160)
}

// ── Measuring ───

/** What takes turns with others. */
type Contestant = {
  name: string
  /** Before every run; takes no part in its time. */
  prepare?: () => Promise<void> | void
  /** Milliseconds of one run. */
  run: () => Promise<number>
  /** Turns, if fewer than the others. */
  turns?: number
}

/** What a contestant achieved, or why it could not. */
type Measure = { times: number[]; failure?: string }

/** Lets contestants take turns; one that fails is out, and its measure says why. */
async function inTurns(lab: Lab, section: string, contestants: readonly Contestant[]): Promise<Measure[]> {
  const measures = contestants.map((): Measure => ({ times: [] }))
  for (let turn = 0; turn < lab.sizes.turns; turn++)
    for (const [at, contestant] of contestants.entries())
      if (turn < (contestant.turns ?? Infinity)) await takeTurn(contestant, measures[at]!)
  for (const [at, { name }] of contestants.entries())
    lab.samples.set(`${section}: ${name}`, measures[at]!.times)
  return measures
}

async function takeTurn(contestant: Contestant, measure: Measure): Promise<void> {
  if (measure.failure !== undefined) return
  try {
    await contestant.prepare?.()
    measure.times.push(await contestant.run())
  } catch (error) {
    await haltIfStopping()
    measure.failure = error instanceof Error ? error.message : String(error)
    say(`${contestant.name} is out: ${measure.failure}`)
  }
}

const OUTPUT = "/root/output"

/** Starts a script on the client; a program in the background cannot hold its end up, as it writes to a file. */
function start(lab: Lab, script: string, cwd: string): Running {
  const running = lab.client.spawn(["/bin/sh", "-c", `exec >${OUTPUT} 2>&1\n${script}`], {
    cwd,
    timeout: 300_000,
  })
  running.end()
  return running
}

/** Milliseconds that a script takes on the client. */
async function time(lab: Lab, script: string, cwd: string): Promise<number> {
  const began = performance.now()
  const { code } = await start(lab, script, cwd).result
  const milliseconds = performance.now() - began
  checkCode(lab, script, code)
  return milliseconds
}

function checkCode(lab: Lab, script: string, code: number): void {
  if (code === 0) return
  const output = readFileSync(lab.client.outside(OUTPUT), "utf8")
  throw new Error(`${lastWords(script)}: exit code ${code}: ${lastWords(output)}`)
}

/** The shell line of an edict command on a host. */
const edict = (host: string, command: string, options = ""): string =>
  `'${EDICT}' ${options} root@${host} ${command}`

/** Milliseconds that edict takes on a connection that is open. */
async function timeEdict(lab: Lab, host: string, command: string, cwd: string): Promise<number> {
  await warmUp(lab, host)
  const milliseconds = await time(lab, edict(host, command), cwd)
  lab.lastUse.set(host, performance.now())
  return milliseconds
}

/** Opens edict's own connection where it may have been closed meanwhile. */
async function warmUp(lab: Lab, host: string): Promise<void> {
  const idle = performance.now() - (lab.lastUse.get(host) ?? -Infinity)
  if (idle > 30_000) await time(lab, edict(host, "nix --version"), "/root")
  lab.lastUse.set(host, performance.now())
}

const REPORT = "/root/report.json"

/** Milliseconds of one stage of the edict run that wrote the report last. */
function stageTime(lab: Lab, name: string): number {
  const report = JSON.parse(readFileSync(lab.client.outside(REPORT), "utf8")) as {
    stages: { stage: string; milliseconds: number }[]
  }
  return report.stages.filter(({ stage }) => stage === name).reduce((sum, next) => sum + next.milliseconds, 0)
}

/** Most resident memory, in bytes, of the very process that a script of `start` became by `exec`. */
async function peakMemory(running: Running): Promise<number> {
  const file = `/proc/${await running.pid()}/status`
  let peak = 0
  const timer = setInterval(() => (peak = residentPeak(file) ?? peak), 20)
  await running.result
  clearInterval(timer)
  return peak
}

function residentPeak(file: string): number | undefined {
  if (!existsSync(file)) return undefined
  const kibibytes = /^VmHWM:\s*(\d+) kB$/m.exec(readFileSync(file, "utf8"))?.[1]
  return kibibytes === undefined ? undefined : Number(kibibytes) * 1024
}

// ── Figures ───

/** A median with the least and the greatest of what it was taken from. */
type Spread = { median: number; min: number; max: number }

function spreadOf(values: readonly number[]): Spread {
  const sorted = values.toSorted((a, b) => a - b)
  const middle = sorted.length / 2
  const median = (sorted[Math.ceil(middle) - 1]! + sorted[Math.floor(middle)]!) / 2
  return { median, min: sorted[0]!, max: sorted.at(-1)! }
}

/** The times of a measure; throws where there are none. */
function timesOf({ times, failure }: Measure): number[] {
  if (failure !== undefined || times.length === 0) throw new Error(failure ?? "left out by --quick")
  return times
}

/** `a` divided by `b`, turn by turn. */
function ratio(a: Measure, b: Measure): Spread {
  const [above, below] = [timesOf(a), timesOf(b)]
  const turns = Math.min(above.length, below.length)
  return spreadOf(Array.from({ length: turns }, (_, turn) => above[turn]! / below[turn]!))
}

/** Least-squares slope. */
function slope(points: readonly (readonly [x: number, y: number])[]): number {
  const mean = (values: number[]) => values.reduce((sum, next) => sum + next, 0) / values.length
  const [x, y] = [mean(points.map(([x]) => x)), mean(points.map(([, y]) => y))]
  const covariance = points.reduce((sum, point) => sum + (point[0] - x) * (point[1] - y), 0)
  return covariance / points.reduce((sum, point) => sum + (point[0] - x) ** 2, 0)
}

/** Round trips: the slope of the median times over the round-trip times; least and greatest of single turns. */
function roundTrips(rtts: readonly number[], measures: readonly Measure[]): Spread {
  const times = measures.map(timesOf)
  const line = (pick: (of: number[]) => number) => slope(rtts.map((rtt, at) => [rtt, pick(times[at]!)]))
  const turns = Math.min(...times.map(({ length }) => length))
  const single = Array.from({ length: turns }, (_, turn) => line((of) => of[turn]!))
  return { ...spreadOf(single), median: line((of) => spreadOf(of).median) }
}

/** `3.1 RTT (3.0–3.3)` */
function figure({ median, min, max }: Spread, unit: string, digits = 1): string {
  const [middle, least, most] = [median, min, max].map((value) => value.toFixed(digits))
  return unit === "×" ? `×${middle} (${least}–${most})` : `${middle} ${unit} (${least}–${most})`
}

const scaled = ({ median, min, max }: Spread, factor: number): Spread => ({
  median: median * factor,
  min: min * factor,
  max: max * factor,
})

const seconds = (measure: Measure): string => figure(scaled(spreadOf(timesOf(measure)), 1e-3), "s", 2)

const milliseconds = (measure: Measure): string => figure(spreadOf(timesOf(measure)), "ms")

/** Megabytes a second. */
function speed(bytes: number, measure: Measure): string {
  return figure(spreadOf(timesOf(measure).map((time) => bytes / time / 1000)), "MB/s", 0)
}

/** A figure, or why there is none. */
function orWhy(text: () => string): string {
  try {
    return text()
  } catch (error) {
    return `not measured: ${(error instanceof Error ? error.message : String(error)).replaceAll("|", "\\|")}`
  }
}

// ── Sections ───

/** One line of the table of what must hold. */
type Row = { case: string; must: string; measured: string; peer: string }

/** One line of the wall times over round-trip times. */
type Wall = { case: string; tool: string; times: string[] }

type Findings = { rows: Row[]; walls: Wall[] }

type Section = {
  name: string
  hosts: (sizes: Sizes) => string[]
  measure: (lab: Lab) => Promise<Findings>
}

function row(name: string, must: string, measured: () => string, peer: () => string): Row {
  return { case: name, must, measured: orWhy(measured), peer: orWhy(peer) }
}

const only = (...rows: Row[]): Findings => ({ rows, walls: [] })

// ── Round trips ───

/** A way to build on a host, in a directory of its own for each host. */
type Tool = {
  name: string
  /** Where it works: on the client or, for plain ssh, on the host. */
  place: (lab: Lab, host: string) => { machine: Client | Host; directory: string }
  build: (lab: Lab, host: string, name: string) => Promise<number>
}

const placeHere = (tool: string) => (lab: Lab, host: string) => ({
  machine: lab.client,
  directory: `/root/${tool}-${host}`,
})

const EDICT_TOOL: Tool = {
  name: "edict",
  place: placeHere("edict"),
  build: (lab, host, name) => timeEdict(lab, host, `nix build .#${name}`, `/root/edict-${host}`),
}

const NAIVE_TOOL: Tool = {
  name: "naive script",
  place: placeHere("naive"),
  build: (lab, host, name) => time(lab, `${NAIVE} root@${host} ${name}`, `/root/naive-${host}`),
}

const PLAIN_TOOL: Tool = {
  name: "plain ssh",
  place: (lab, host) => ({ machine: lab.hosts.get(host)!, directory: "/root/plain" }),
  build: (lab, host, name) =>
    time(lab, `ssh ${SHARED} root@${host} 'cd /root/plain && nix build .#${name}'`, "/root"),
}

type Case = { title: string; must: string; tools: Tool[]; change?: (outside: string) => void }

const CASES: Case[] = [
  {
    title: "`nix build .#x`, tree unchanged, result already here",
    must: "≤ 4 RTT",
    tools: [EDICT_TOOL, NAIVE_TOOL, PLAIN_TOOL],
  },
  {
    title: "small edit, new small result",
    must: "≤ 14 RTT",
    tools: [EDICT_TOOL, NAIVE_TOOL, PLAIN_TOOL],
    change: (outside) => writeFileSync(join(outside, "salt.txt"), salt()),
  },
  {
    title: `larger upload (${ASSETS.files} changed files of ${ASSETS.bytes >> 10} KiB), result already here`,
    must: "",
    tools: [EDICT_TOOL, NAIVE_TOOL],
    change: writeAssets,
  },
]

/** Every case on every host by every tool, in turns; the cases follow each other so that connections stay warm. */
async function measureRoundTrips(lab: Lab): Promise<Findings> {
  for (const tool of [EDICT_TOOL, NAIVE_TOOL, PLAIN_TOOL])
    for (const rtt of lab.sizes.rtts) await firstBuild(lab, tool, hostOf(rtt))
  const runs = CASES.flatMap((work) =>
    lab.sizes.rtts.flatMap((rtt) => work.tools.map((tool) => ({ work, rtt, tool }))),
  )
  const contestants = runs.map(({ work, rtt, tool }) => contestantOf(lab, work, tool, rtt))
  const measures = await inTurns(lab, "round trips", contestants)
  const of = (work: Case, tool: Tool) =>
    measures.filter((_, at) => runs[at]!.work === work && runs[at]!.tool === tool)
  return {
    rows: CASES.map((work) => roundTripRow(lab, work, (tool) => of(work, tool))),
    walls: CASES.flatMap((work) =>
      work.tools.map((tool) => ({
        case: work.title,
        tool: tool.name,
        times: of(work, tool).map((measure) => orWhy(() => seconds(measure))),
      })),
    ),
  }
}

/** Makes the project of a tool, and its first run: everything travels. */
async function firstBuild(lab: Lab, tool: Tool, host: string): Promise<void> {
  const { machine, directory } = tool.place(lab, host)
  if (!existsSync(machine.outside(directory))) await makeProject(lab, machine, directory)
  await tool.build(lab, host, "small")
}

function contestantOf(lab: Lab, work: Case, tool: Tool, rtt: number): Contestant {
  const { machine, directory } = tool.place(lab, hostOf(rtt))
  return {
    name: `${work.title}, ${tool.name}, RTT ${rtt} ms`,
    prepare: () => work.change?.(machine.outside(directory)),
    run: () => tool.build(lab, hostOf(rtt), "small"),
  }
}

function roundTripRow(lab: Lab, work: Case, of: (tool: Tool) => Measure[]): Row {
  const trips = (tool: Tool) => orWhy(() => figure(roundTrips(lab.sizes.rtts, of(tool)), "RTT"))
  const [own, ...others] = work.tools
  const peers = () => others.map((tool) => `${tool.name} ${trips(tool)}`).join("; ")
  return row(work.title, work.must, () => trips(own!), peers)
}

// ── Closures ───

async function measureClosures(lab: Lab): Promise<Findings> {
  const tools = [EDICT_TOOL, NAIVE_TOOL]
  for (const tool of tools) await firstBuild(lab, tool, FAR.name)
  const places = tools.map((tool) => tool.place(lab, FAR.name).directory)
  const paths: string[] = []
  const fetching = (tool: Tool, name: string): Contestant => ({
    name: `${tool.name}, .#${name}`,
    prepare: () => forget(lab, places, paths),
    run: () => fetchResult(lab, tool, name),
    ...(tool === NAIVE_TOOL ? { turns: lab.sizes.slowTurns } : {}),
  })
  for (const name of ["many", "one"]) {
    await EDICT_TOOL.build(lab, FAR.name, name) // from now on it is built over there
    paths.push(resultIn(lab, places[0]!))
  }
  const [one, many, naiveOne, naiveMany] = await inTurns(
    lab,
    "closure",
    tools.flatMap((tool) => ["one", "many"].map((name) => fetching(tool, name))),
  )
  const compared = (above: Measure, below: Measure) =>
    `${figure(ratio(above, below), "×", 2)}: ${seconds(above)} against ${seconds(below)}`
  return only(
    row(
      `closure of ${lab.sizes.closure} paths, compared with a closure of 1, at ${FAR.rtt} ms`,
      "≤ 1.2×",
      () => compared(many!, one!),
      () => `naive script ${compared(naiveMany!, naiveOne!)}`,
    ),
  )
}

/** Milliseconds of a build on the far host whose result is not here yet. */
async function fetchResult(lab: Lab, tool: Tool, name: string): Promise<number> {
  const milliseconds = await tool.build(lab, FAR.name, name)
  resultIn(lab, tool.place(lab, FAR.name).directory)
  return milliseconds
}

/** Where the result link of a directory leads to; throws unless that came here. */
function resultIn(lab: Lab, directory: string): string {
  const path = readlinkSync(lab.client.outside(`${directory}/result`))
  if (!existsSync(lab.client.outside(path))) throw new Error(`${path} did not come here`)
  return path
}

/** Takes store paths with their closures, and the result links of these directories, from the client. */
async function forget(lab: Lab, directories: readonly string[], paths: readonly string[]): Promise<void> {
  const script = `
    rm -f ${directories.map((directory) => `${directory}/result`).join(" ")}
    closure=$(for path in ${paths.join(" ")}; do
      if nix-store --check-validity $path; then nix-store --query --requisites $path; fi
    done 2>/dev/null | sort -u)
    if [ -n "$closure" ]; then nix-store --delete $closure; fi`
  await quietly(lab.client, script)
  const left = paths.find((path) => existsSync(lab.client.outside(path)))
  if (left !== undefined) throw new Error(`${left} is still on the client`)
}

// ── Chains ───

const PEER = "/root/peer"

/** Nix's own ways, with connections of their own as they come, and over the shared one. */
async function measureChains(lab: Lab): Promise<Findings> {
  await makeProject(lab, lab.client, PEER)
  await firstBuild(lab, EDICT_TOOL, FAR.name)
  const own = EDICT_TOOL.place(lab, FAR.name).directory
  const peer = (name: string, script: string): Contestant => ({
    name,
    prepare: () => resalt(lab, PEER),
    run: () => time(lab, script, PEER),
  })
  const [edictTimes, builders, store, sharedStore, sharedBuilders] = await inTurns(lab, "chain", [
    { name: "edict", prepare: () => resalt(lab, own), run: () => fetchResult(lab, EDICT_TOOL, "chain") },
    { ...peer("nix --builders ssh://", BUILDERS), turns: lab.sizes.slowTurns },
    peer("nix --store ssh-ng://", REMOTE_STORE),
    peer("nix --store ssh-ng://, shared connection", `${SHARE}${REMOTE_STORE}`),
    {
      ...peer("nix --builders ssh://, shared connection", `${SHARE}${BUILDERS}`),
      turns: lab.sizes.slowTurns - 1, // none with --quick
    },
  ])
  const faster = (their: Measure) => orWhy(() => figure(ratio(their, edictTimes!), "×"))
  const chainRow = (way: string, must: string, plain: Measure, shared: Measure) =>
    row(
      `chain of ${lab.sizes.chain} steps at ${FAR.rtt} ms against ${way}`,
      must,
      () => `${faster(plain)} faster (over a shared connection ${faster(shared)}): ${seconds(edictTimes!)}`,
      () => `${seconds(plain)}; over a shared connection ${orWhy(() => seconds(shared))}`,
    )
  const copying = "`nix build --store ssh-ng:// --eval-store auto` + `nix copy`"
  return only(
    chainRow("`--builders ssh://`", "≥ ×15", builders!, sharedBuilders!),
    chainRow(copying, "≥ ×1.5", store!, sharedStore!),
  )
}

/** Lets the next build of a project be a new one. */
function resalt(lab: Lab, directory: string): void {
  writeFileSync(lab.client.outside(join(directory, "salt.txt")), salt())
}

/** Lets Nix use the shared connection. */
const SHARE = `export NIX_SSHOPTS="${SHARED}"`

const BUILDERS = `
  nix build .#chain --builders 'ssh://root@${FAR.name} ${SYSTEM}' --max-jobs 0`

const REMOTE_STORE = `
  set -e
  path=$(nix build .#chain --store ssh-ng://root@${FAR.name} --eval-store auto --no-link --json |
    sed 's/.*"out":"\\([^"]*\\)".*/\\1/')
  nix copy --no-check-sigs --from ssh-ng://root@${FAR.name} "$path"
  nix-store --realise "$path" --add-root result --indirect`

// ── A big result ───

async function measureBig(lab: Lab): Promise<Findings> {
  const { directory } = EDICT_TOOL.place(lab, NEAR)
  const bytes = lab.sizes.big
  await firstBuild(lab, EDICT_TOOL, NEAR)
  await EDICT_TOOL.build(lab, NEAR, "big")
  const path = resultIn(lab, directory)
  const peaks: number[] = []
  const results: Measure = { times: [] }
  const fresh = () => forget(lab, [directory], [path])
  const ssh = `ssh ${SHARED} root@${NEAR}`
  const [whole, file, nothing, stream] = await inTurns(
    { ...lab, sizes: { ...lab.sizes, turns: lab.sizes.slowTurns } },
    "big",
    [
      { name: "edict", prepare: fresh, run: () => timeBig(lab, directory, { peaks, results }) },
      {
        name: "ssh cat >file",
        prepare: async () => void (await quietly(lab.client, "rm -f /nix/sink")),
        run: () => time(lab, `${ssh} cat ${path} >/nix/sink`, "/root"),
      },
      { name: "ssh cat >/dev/null", run: () => time(lab, `${ssh} cat ${path} >/dev/null`, "/root") },
      {
        name: "nix-store --export, --import",
        prepare: fresh,
        run: () => time(lab, `${ssh} nix-store --export ${path} | nix-store --import`, "/root"),
      },
    ],
  )
  lab.samples.set("big: edict, results stage", results.times)
  const title = `${bytes / 1e9} GB closure (one incompressible file) over loopback`
  const of = (peer: Measure, own: Measure) => figure(ratio(peer, own), "of its speed", 2)
  return only(
    row(
      `${title} against \`ssh HOST cat\` into a file`,
      "≥ 0.6",
      () =>
        `${of(file!, whole!)}, ${speed(bytes, whole!)} for the whole run; its transfer alone ${of(file!, results)}`,
      () => speed(bytes, file!),
    ),
    row(
      `the same against \`ssh HOST cat >/dev/null\``,
      "",
      () => `${of(nothing!, whole!)}; its transfer alone ${of(nothing!, results)}`,
      () => `${speed(bytes, nothing!)}; \`nix-store --export\` into \`--import\` ${speed(bytes, stream!)}`,
    ),
    row(
      "peak memory of edict meanwhile",
      "≤ 90 MiB",
      () => figure(scaled(spreadOf(timesOf({ times: peaks })), 2 ** -20), "MiB", 0),
      () => "",
    ),
  )
}

/** One run of edict that fetches the big result; notes its peak memory and the time of its results stage. */
async function timeBig(
  lab: Lab,
  directory: string,
  notes: { peaks: number[]; results: Measure },
): Promise<number> {
  await warmUp(lab, NEAR)
  const script = edict(NEAR, "nix build .#big", `--report ${REPORT}`)
  const began = performance.now()
  const running = start(lab, `exec ${script}`, directory)
  const peak = await peakMemory(running)
  const milliseconds = performance.now() - began
  checkCode(lab, script, (await running.result).code)
  notes.peaks.push(peak)
  notes.results.times.push(stageTime(lab, "results"))
  return milliseconds
}

// ── A large tree ───

const LARGE = "/root/large"

async function measureTree(lab: Lab): Promise<Findings> {
  const { files, directories } = lab.sizes
  await makeLargeTree(lab)
  const scans: Measure = { times: [] }
  const command = edict(NEAR, "nix --version", `--sync --report ${REPORT}`)
  const run = async () => {
    await warmUp(lab, NEAR)
    const milliseconds = await time(lab, command, LARGE)
    scans.times.push(stageTime(lab, "scan"))
    return milliseconds
  }
  // The upload; then files that were too young to be trusted are not any more; then both sides remember what they saw.
  for (let n = 0; n < 4; n++) await run()
  scans.times.length = 0
  const [whole, status] = await inTurns(lab, "tree", [
    { name: "edict --sync", run },
    { name: "git status", run: () => time(lab, "git status --porcelain", LARGE) },
  ])
  lab.samples.set("tree: edict, scan stage", scans.times)
  return only(
    row(
      `git tree of ${files.toLocaleString("en")} files in ${directories.toLocaleString("en")} directories, nothing changed, against \`git status\` of it`,
      "≤ 2×",
      () =>
        `whole run (\`--sync HOST nix --version\`) ${figure(ratio(whole!, status!), "×")}: ${seconds(whole!)}; scan alone ${figure(ratio(scans, status!), "×")}: ${seconds(scans)}`,
      () => seconds(status!),
    ),
  )
}

/** Small files, spread evenly over directories two levels deep, all committed. */
async function makeLargeTree(lab: Lab): Promise<void> {
  const { files, directories } = lab.sizes
  const outside = lab.client.outside(LARGE)
  const nameOf = (n: number) => join(outside, "src", `d${n % 400}`, `e${Math.floor(n / 400)}`)
  for (let n = 0; n < directories; n++) mkdirSync(nameOf(n), { recursive: true })
  for (let n = 0; n < files; n++) writeFileSync(join(nameOf(n % directories), `f${n}`), `file ${n}\n`)
  await quietly(
    lab.client,
    `git config --global gc.auto 0 && ${GIT_INIT} && git gc -q && sleep 1 && git status --porcelain`,
    LARGE,
  )
}

// ── Start-up ───

const STARTS = 10

async function measureStart(lab: Lab): Promise<Findings> {
  const empty = await compileEmpty(lab)
  const starting = (program: string) => async () => {
    const loop = `n=0; while [ $n -lt ${STARTS} ]; do '${program}' --version; n=$((n + 1)); done`
    return (await time(lab, loop, "/root")) / STARTS
  }
  const [own, bare] = await inTurns(
    { ...lab, sizes: { ...lab.sizes, turns: lab.sizes.turns * 2 } },
    "start",
    [
      { name: "edict --version", run: starting(EDICT) },
      { name: "an empty compiled Bun program", run: starting(empty) },
    ],
  )
  return only(
    row(
      "start-up (`--version`) against an empty compiled Bun program",
      "≤ 5×",
      () => `${figure(ratio(own!, bare!), "×", 2)}: ${milliseconds(own!)}`,
      () => milliseconds(bare!),
    ),
  )
}

/** Compiles a program of nothing as edict is compiled; answers its path on the client. */
async function compileEmpty(lab: Lab): Promise<string> {
  const directory = "/root/empty"
  const outside = lab.client.outside(directory)
  writeFiles(outside, { "empty.ts": "export {}\n" })
  const flags = ["--compile", "--minify", "--bytecode", "--format=esm", "--no-compile-autoload-dotenv"]
  const out = ["--no-compile-autoload-bunfig", "--outfile", join(outside, "empty")]
  const child = Bun.spawn([process.execPath, "build", join(outside, "empty.ts"), ...flags, ...out], {
    cwd: outside,
    stdout: "ignore",
    stderr: "pipe",
  })
  if ((await child.exited) !== 0) throw new Error(`bun build: ${lastWords(await child.stderr.text())}`)
  return join(directory, "empty")
}

// ── The report ───

const SECTIONS: Section[] = [
  { name: "roundtrips", hosts: ({ rtts }) => rtts.map(hostOf), measure: measureRoundTrips },
  { name: "closure", hosts: () => [FAR.name], measure: measureClosures },
  { name: "chain", hosts: () => [FAR.name], measure: measureChains },
  { name: "big", hosts: () => [NEAR], measure: measureBig },
  { name: "tree", hosts: () => [NEAR], measure: measureTree },
  { name: "start", hosts: () => [], measure: measureStart },
]

/** What the figures were taken on. */
async function describeMachine(lab: Lab): Promise<Record<string, string>> {
  const first = (script: string) => quietly(lab.client, `${script} 2>&1 | head -n 1`)
  const processors = cpus()
  return {
    machine: `${processors.length} cores, ${processors[0]?.model.trim() ?? "unknown"}, ${Math.round(totalmem() / 2 ** 30)} GiB`,
    kernel: `${release()} ${process.arch}`,
    "load average at the end": loadavg()
      .map((load) => load.toFixed(1))
      .join(" "),
    nix: await first("nix --version"),
    git: await first("git --version"),
    rsync: (await first("rsync --version")).replace(/\s+/g, " "),
    OpenSSH: await first("ssh -V"),
    bun: Bun.version,
    edict: `${await first(`'${EDICT}' --version`)} (${sourceVersion()})`,
  }
}

/** The commit of the checkout, and whether edict.ts differs from it. */
function sourceVersion(): string {
  const git = (...words: string[]) =>
    Bun.spawnSync(["git", "-C", REPOSITORY, ...words], { stderr: "ignore" })
      .stdout.toString()
      .trim()
  const changed = git("status", "--porcelain", "--", "edict.ts") !== ""
  return (git("rev-parse", "--short", "HEAD") || "no commit") + (changed ? ", changed since" : "")
}

function markdownTable(heads: readonly string[], lines: readonly (readonly string[])[]): string {
  const line = (cells: readonly string[]) => `| ${cells.join(" | ")} |`
  return [line(heads), line(heads.map(() => "---")), ...lines.map(line)].join("\n")
}

function markdown(lab: Lab, { rows, walls }: Findings, machine: Record<string, string>): string {
  const table = markdownTable(
    ["case", "must", "measured", "naive script or peer"],
    rows.map((next) => [next.case, next.must, next.measured, next.peer]),
  )
  const wall = markdownTable(
    ["wall time", "by", ...lab.sizes.rtts.map((rtt) => `RTT ${rtt} ms`)],
    walls.map((next) => [next.case, next.tool, ...next.times]),
  )
  const { turns, slowTurns } = lab.sizes
  const quick =
    lab.sizes === QUICK ? "Quick run: smaller sizes, and fewer turns, than what must hold is meant for. " : ""
  const how = `${quick}Medians of ${turns} turns (${slowTurns} for slow peers and the big result), with minimum and maximum; ratios are taken turn by turn. RTT: round trips, as the slope of wall time over round-trip time. The connections of edict, the script and plain ssh were open.`
  const facts = Object.entries(machine).map(([name, text]) => `- ${name}: ${text}`)
  return [table, ...(walls.length > 0 ? [wall] : []), how, facts.join("\n")].join("\n\n")
}

// ── Main ───

let stopping = false

/** The machines are going: nothing may be written to where they were, as that would stay. */
async function haltIfStopping(): Promise<void> {
  if (stopping) await new Promise(() => undefined)
}

/** Tells what goes on, on stderr. */
function say(text: string): void {
  console.error(`bench: ${text}`)
}

type Arguments = { quick: boolean; json: boolean; sections: Section[] }

/** Throws for an unknown option or section. */
function parseArguments(argv: readonly string[]): Arguments {
  const names: string[] = []
  const flags = new Set<string>()
  for (let at = 0; at < argv.length; at++) {
    const word = argv[at]!
    if (word === "--only") names.push(argv[++at] ?? "")
    else if (["--quick", "--json"].includes(word)) flags.add(word)
    else throw new Error(`unknown option ${word}; there are --quick, --json and --only NAME`)
  }
  const unknown = names.find((name) => !SECTIONS.some((section) => section.name === name))
  if (unknown !== undefined)
    throw new Error(`no ${unknown}; there are ${SECTIONS.map(({ name }) => name).join(", ")}`)
  const sections = SECTIONS.filter(({ name }) => names.length === 0 || names.includes(name))
  return { quick: flags.has("--quick"), json: flags.has("--json"), sections }
}

/** A section that fails as a whole becomes a row that says so. */
async function measureSection(lab: Lab, section: Section): Promise<Findings> {
  const began = performance.now()
  try {
    return await section.measure(lab)
  } catch (error) {
    await haltIfStopping()
    const why = error instanceof Error ? error.message : String(error)
    return only({ case: section.name, must: "", measured: `not measured: ${why}`, peer: "" })
  } finally {
    say(`${section.name}: ${Math.round((performance.now() - began) / 1000)} s`)
  }
}

async function main(argv: readonly string[]): Promise<void> {
  const { quick, json, sections } = parseArguments(argv)
  const lab = await startLab(quick ? QUICK : FULL, sections)
  const findings: Findings = { rows: [], walls: [] }
  for (const section of sections) {
    const { rows, walls } = await measureSection(lab, section)
    findings.rows.push(...rows)
    findings.walls.push(...walls)
  }
  const machine = await describeMachine(lab)
  const all = { sizes: lab.sizes, ...findings, machine, milliseconds: Object.fromEntries(lab.samples) }
  console.log(json ? JSON.stringify(all, null, 2) : markdown(lab, findings, machine))
}

/** Ctrl-C and kill: the machines go first. */
function stopOn(signal: NodeJS.Signals): void {
  process.on(signal, () => {
    stopping = true
    void stopLab().finally(() => process.exit(128 + constants.signals[signal]))
  })
}

for (const signal of ["SIGINT", "SIGTERM", "SIGHUP"] as const) stopOn(signal)
try {
  await main(process.argv.slice(2))
} catch (error) {
  await haltIfStopping()
  say(error instanceof Error ? error.message : String(error))
  process.exitCode = 1
} finally {
  await stopLab()
}
