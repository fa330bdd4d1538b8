// Random edits on both sides, between and during runs, with kills: checked against a plain three-way model.
// The seed is always the same, so that what fails is the change that was made; FUZZ_SEED=N tries another one,
// FUZZ_SECONDS=N makes it longer.
import { afterAll, beforeAll, expect, setDefaultTimeout, test } from "bun:test"
import fs from "node:fs"
import { join } from "node:path"
import { appears, conflictsOf, expectNothingLeft, ignoredBy, snapshot, startLab, type Lab } from "./sync-lab"

const SECONDS = Number(process.env.FUZZ_SECONDS ?? 50)
const SEED = Number(process.env.FUZZ_SEED ?? 20_261_122)
setDefaultTimeout((SECONDS + 60) * 1000)

type Random = { next: (below: number) => number; pick: <T>(items: readonly T[]) => T }

/** Mulberry32. */
function randomOf(seed: number): Random {
  let state = seed >>> 0
  const next = (below: number) => {
    state = (state + 0x6d2b79f5) >>> 0
    let mixed = Math.imul(state ^ (state >>> 15), state | 1)
    mixed ^= mixed + Math.imul(mixed ^ (mixed >>> 7), mixed | 61)
    return ((mixed ^ (mixed >>> 14)) >>> 0) % below
  }
  return { next, pick: (items) => items[next(items.length)]! }
}

// ── Edits ───

const NAMES = ["a", "b", "c", "d", "e", "x.o", "y.tmp", "cache"]
const RULES = ["*.o\ncache/\n", "*.tmp\n", "*.o\n*.tmp\n", ""]

const nameOf = (random: Random): string =>
  Array.from({ length: 1 + random.next(3) }, () => random.pick(NAMES)).join("/")

/** One random edit below a directory; contents all have one size, and no content is written twice. */
function edit(directory: string, random: Random, content: string): void {
  const name = nameOf(random)
  const file = join(directory, name)
  const clear = () => {
    for (const [at] of [...name.split("/").entries()].slice(0, -1)) {
      const parent = join(
        directory,
        name
          .split("/")
          .slice(0, at + 1)
          .join("/"),
      )
      if (fs.lstatSync(parent, { throwIfNoEntry: false })?.isDirectory() === false) fs.rmSync(parent)
    }
    fs.mkdirSync(join(file, ".."), { recursive: true })
  }
  const stat = fs.lstatSync(parentIsReal(directory, name) ? file : join(directory, "\0none".slice(1)), {
    throwIfNoEntry: false,
  })
  const kind = random.next(20)
  if (kind < 7) {
    clear()
    if (stat?.isDirectory()) fs.rmSync(file, { recursive: true })
    const executable = random.next(4) === 0
    if (random.next(2) === 0) fs.rmSync(file, { force: true })
    fs.writeFileSync(`${file}.new`, content, { mode: executable ? 0o755 : 0o644 })
    fs.renameSync(`${file}.new`, file)
  } else if (kind < 9 && stat?.isFile()) fs.writeFileSync(file, content)
  else if (kind < 12 && stat) fs.rmSync(file, { recursive: true })
  else if (kind < 14 && stat) {
    const to = join(directory, random.pick(["f", "g", "h"]))
    fs.rmSync(to, { recursive: true, force: true })
    fs.renameSync(file, to)
  } else if (kind === 14 && stat?.isFile()) fs.chmodSync(file, (stat.mode & 0o100) === 0 ? 0o755 : 0o644)
  else if (kind === 15) {
    clear()
    fs.rmSync(file, { recursive: true, force: true })
    fs.symlinkSync(random.pick(["a", "../b", "/etc/hostname", "nowhere", content]), file)
  } else if (kind === 16) {
    clear()
    if (!stat?.isDirectory()) fs.rmSync(file, { force: true })
    fs.mkdirSync(file, { recursive: true })
  } else if (kind === 17 && stat?.isFile()) fs.writeFileSync(file, fs.readFileSync(file))
  else if (kind === 18 && stat?.isFile()) fs.utimesSync(file, 1e9, 1e9)
  else if (kind === 19 && random.next(3) === 0)
    fs.writeFileSync(join(directory, ".gitignore"), random.pick(RULES))
}

function parentIsReal(directory: string, name: string): boolean {
  const parents = name
    .split("/")
    .slice(0, -1)
    .map((_, at, parts) => join(directory, parts.slice(0, at + 1).join("/")))
  return parents.every((parent) => fs.lstatSync(parent, { throwIfNoEntry: false })?.isDirectory())
}

// ── The model ───

type State = ReadonlyMap<string, string>
type Outcome = {
  base: State
  local: State
  remote: State
  after: State
  kept: Record<string, string>
  ignored: ReadonlySet<string>
  plain: boolean
  deletions: boolean
  /** Whether all of it was applied: not if edict was killed. */
  whole: boolean
  /** Whether a killed run went before: what it had done may be done once more. */
  again?: true
}

/** A value without its executable bit, and the bit. */
const contentOf = (value: string | undefined) => (value?.startsWith("*") ? value.slice(1) : value)
const bitOf = (value: string | undefined) => value?.startsWith("*") ?? false
const fileOf = (state: State, name: string) => {
  const value = state.get(name)
  return value === "/" ? undefined : value
}

/** What is wrong with an outcome, by the three-way rule, path by path. */
function violations(outcome: Outcome): string[] {
  const { base, local, remote, after, kept, whole } = outcome
  const names = new Set([...base.keys(), ...local.keys(), ...remote.keys(), ...after.keys()])
  return [...names].flatMap((name) => {
    const [b, l, r, now] = [base, local, remote, after].map((state) => fileOf(state, name))
    const wrong = (rule: string) => [
      `${name}: ${rule} (base ${b}, here ${l}, there ${r}, now ${now}, kept ${kept[name]})`,
    ]
    const keptHas = (value: string | undefined) =>
      Object.entries(kept).some(
        ([path, found]) => path.startsWith(name) && contentOf(found) === contentOf(value),
      )
    // Directories are things of their own outside git alone.
    const wasDirectory = outcome.plain && base.get(name) === "/"
    const isNew = b === undefined && !wasDirectory
    // Below a link or file of ours git cannot say what is ignored.
    if (isNew && !outcome.plain && blocked(outcome, name))
      return now === l || now === r ? [] : wrong("new: ours or theirs")
    if (isNew && outcome.ignored.has(name))
      return now === l || now === r ? [] : wrong("ignored files stay as they are")
    const [edited, changed] = [contentOf(l) !== contentOf(b), contentOf(r) !== contentOf(b)]
    // What was brought home and then deleted here, before edict could note that it was, comes once more.
    const redone = outcome.again === true && l === undefined && now === r
    if (edited && l !== undefined && contentOf(now) !== contentOf(l))
      return wrong("what was written here stays")
    if (edited && l === undefined && now !== undefined && !redone && contentOf(l) !== contentOf(r))
      return wrong("what was deleted here stays deleted")
    if (!changed && contentOf(now) !== contentOf(l) && !redone) return wrong("what only we changed stays")
    if (
      !changed &&
      !edited &&
      bitOf(l) === bitOf(b) &&
      b !== undefined &&
      r !== undefined &&
      l !== undefined &&
      whole &&
      bitOf(now) !== bitOf(r)
    )
      return wrong("the executable bit follows the side that changed it")
    if (
      bitOf(l) !== bitOf(b) &&
      b !== undefined &&
      l !== undefined &&
      now !== undefined &&
      bitOf(r) === bitOf(b) &&
      bitOf(now) !== bitOf(l)
    )
      return wrong("an executable bit changed here stays")
    if (!whole || !changed) return []
    if (r !== undefined && contentOf(now) !== contentOf(r) && !keptHas(r))
      return wrong("what was written there is here, or kept")
    if (
      r !== undefined &&
      !edited &&
      local.get(name) !== "/" &&
      !wasDirectory &&
      contentOf(now) !== contentOf(r) &&
      !blocked(outcome, name)
    )
      return wrong("what only they changed follows")
    if (r === undefined && outcome.deletions && !edited && now !== undefined && bitOf(l) === bitOf(b))
      return wrong("what only they deleted goes")
    return []
  })
}

/** Whether something of ours is in the way: a file, or a link, where theirs needs a directory. */
function blocked({ local, after }: Outcome, name: string): boolean {
  const parents = name
    .split("/")
    .slice(0, -1)
    .map((_, at, parts) => parts.slice(0, at + 1).join("/"))
  const isFile = (state: State) => parents.some((parent) => fileOf(state, parent) !== undefined)
  return isFile(local) || isFile(after)
}

// ── Runs ───

type Project = {
  cwd: string
  plain: boolean
  here: string
  there: () => string
  random: Random
  steps: number
  runs: number
  kills: number
  leftovers: Set<string>
  said: string
}

let count = 0
const fresh = (side: string): string => `${side}${String(++count).padStart(8, "0")}`

function edits(project: Project, side: "here" | "there"): void {
  const directory = side === "here" ? project.here : project.there()
  for (let left = project.random.next(14); left > 0; left--) {
    edit(directory, project.random, fresh(side === "here" ? "L" : "R"))
    project.steps++
  }
}

const rulesOf = async (lab: Lab, project: Project, names: Iterable<string>): Promise<Set<string>> => {
  if (project.plain) return new Set()
  const real = [...names].filter((name) => parentIsReal2(project.here, name))
  const asked = new Set(
    real.flatMap((name) => [
      name,
      ...name
        .split("/")
        .slice(0, -1)
        .map((_, at, parts) => `${parts.slice(0, at + 1).join("/")}/`),
    ]),
  )
  const found = await ignoredBy(lab, project.cwd, asked)
  return new Set(
    real.filter(
      (name) =>
        found.has(name) ||
        name.split("/").some((_, at, parts) => at > 0 && found.has(`${parts.slice(0, at).join("/")}/`)),
    ),
  )
}

/** No link or file here above a name: git refuses to look beyond links. */
function parentIsReal2(directory: string, name: string): boolean {
  const parents = name
    .split("/")
    .slice(0, -1)
    .map((_, at, parts) => join(directory, parts.slice(0, at + 1).join("/")))
  return parents.every((parent) => fs.lstatSync(parent, { throwIfNoEntry: false })?.isDirectory() ?? true)
}

/** What must hold as soon as an upload is done: what belongs to the tree is the same on both sides. */
async function compareSides(lab: Lab, project: Project): Promise<State> {
  const [here, there] = [treeOf(project.here), treeOf(project.there())]
  const ignored = await rulesOf(lab, project, new Set([...here.keys(), ...there.keys()]))
  const belongs = ([name, value]: [string, string]) => !ignored.has(name) && (project.plain || value !== "/")
  const extra = ([name]: [string, string]) =>
    fileOf(here, name) !== undefined || (project.plain && here.has(name)) || !wasIgnored(project, name)
  expect(Object.fromEntries([...there].filter(belongs).filter(extra))).toEqual(
    Object.fromEntries([...here].filter(belongs)),
  )
  return new Map([...there].filter(([name]) => here.has(name) && !ignored.has(name)))
}

/** What a killed run leaves to the next one: from what was already done on, it is as after any other run. */
type Pending = { base: State; remote: State; deletions: boolean; kept: Record<string, string> } | undefined

/** Edits here, a run with edits on both sides while the command waits, and its check. */
async function round(lab: Lab, project: Project, pending: Pending): Promise<Pending> {
  const { random, cwd, here } = project
  const before = conflictsOf(here)
  edits(project, "here")
  const earlier = pending && { ...pending, local: treeOf(here) }
  const mark = `/tmp/fuzz-${process.pid}-${++count}`
  const script = `touch ${mark}.at; until [ -e ${mark}.go ]; do sleep 0.02; done`
  const running = lab.client.spawn(lab.argv(script, { options: ["--allow-mass-delete"] }), {
    cwd,
    timeout: 60_000,
  })
  running.end()
  project.runs++
  const ended = running.result
  await Promise.race([appears(lab.host.outside(`${mark}.at`)), ended])
  if (!fs.existsSync(lab.host.outside(`${mark}.at`)))
    throw new Error(`the command did not start: ${(await ended).stderr}`)
  if (earlier) {
    project.said += `recovered: ${running.stderr}`
    const after = treeOf(here)
    const ignored = await rulesOf(lab, project, earlier.remote.keys())
    for (const name of ignored) if (fileOf(earlier.base, name) === undefined) project.leftovers.add(name)
    for (const name of earlier.remote.keys())
      if (fileOf(earlier.base, name) === undefined && wasIgnored(project, name)) ignored.add(name)
    const kept = { ...earlier.kept, ...since(before, conflictsOf(here)) }
    expect(
      violations({ ...earlier, after, kept, ignored, plain: project.plain, whole: true, again: true }),
    ).toEqual([])
  }
  const base = await compareSides(lab, project)
  const keptBefore = conflictsOf(here)
  edits(project, "there")
  edits(project, "here")
  const [local, remote] = [treeOf(here), treeOf(project.there())]
  fs.writeFileSync(lab.host.outside(`${mark}.go`), "")
  const killed = random.next(4) === 0
  if (killed) {
    project.kills++
    await Bun.sleep(random.next(300))
    await running.kill("SIGKILL").catch(() => undefined)
  }
  const result = await ended
  project.said += `${result.code} ${result.stderr}`
  const after = treeOf(here)
  const kept = since(keptBefore, conflictsOf(here))
  const ignored = await rulesOf(lab, project, remote.keys())
  for (const name of ignored) if (fileOf(base, name) === undefined) project.leftovers.add(name)
  // What was ignored when it was made is looked at again only when it changes, or when its directory no longer is.
  for (const name of remote.keys())
    if (fileOf(base, name) === undefined && wasIgnored(project, name)) ignored.add(name)
  const whole = result.code !== 137
  expect(result.stderr).not.toContain("this is a bug")
  expect(
    violations({ base, local, remote, after, kept, ignored, plain: project.plain, deletions: true, whole }),
  ).toEqual([])
  if (!whole) {
    const done = [
      ...after,
      ...[...base.keys()].filter((name) => !after.has(name)).map((name) => [name, undefined] as const),
    ]
    const settled = new Map<string, string>(base)
    for (const [name, value] of done)
      if (value === remote.get(name)) {
        if (value === undefined) settled.delete(name)
        else settled.set(name, value)
      }
    return { base: settled, remote, deletions: true, kept }
  }
  expect(result.code === 254 || (result.code === 0 && Object.keys(kept).length === 0)).toBe(true)
  expect(result.stderr.includes("conflict: ")).toBe(result.code === 254)
  expectNothingLeft(here)
  return undefined
}

/** Whether a name, or a directory that it lies in, stayed over there because it was ignored. */
const wasIgnored = ({ leftovers }: Project, name: string): boolean =>
  name.split("/").some((_, at, parts) => leftovers.has(parts.slice(0, at + 1).join("/")))

/** What lies below a directory; without what a killed run left behind for the next one to clear. */
const treeOf = (directory: string): State =>
  new Map([...snapshot(directory)].filter(([name]) => !name.includes(".edict-stage")))

const since = (before: Record<string, string>, after: Record<string, string>): Record<string, string> =>
  Object.fromEntries(Object.entries(after).filter(([name, value]) => before[name] !== value))

let lab: Lab
beforeAll(async () => void (lab = await startLab()))
afterAll(async () => await lab?.[Symbol.asyncDispose]())

test.concurrent.each([
  ["a git repository", false],
  ["a plain directory", true],
])("random edits on both sides of %s", async (name, plain) => {
  const cwd = plain ? "/root/plain" : "/root/git"
  const setup = plain
    ? ""
    : `git init -q; printf '*.o\\ncache/\\n' >.gitignore; git add -A; git commit -qm first`
  expect(await lab.client.run(["/bin/sh", "-ec", `mkdir ${cwd}; cd ${cwd}; ${setup}`])).toMatchObject({
    code: 0,
  })
  const random = randomOf(SEED + (plain ? 1 : 0))
  const project: Project = {
    cwd,
    plain,
    here: lab.client.outside(cwd),
    there: () => lab.remote(cwd),
    random,
    steps: 0,
    runs: 0,
    kills: 0,
    leftovers: new Set(),
    said: "",
  }
  let pending: Pending
  try {
    for (const end = Date.now() + SECONDS * 1000; Date.now() < end;) {
      pending = await round(lab, project, pending)
      fs.rmSync(join(project.here, plain ? ".edict-conflicts" : ".git/edict/conflicts"), {
        recursive: true,
        force: true,
      })
    }
    await lab.edict(cwd, ":", { options: ["--allow-mass-delete"] })
    const quiet = await lab.edict(cwd, ":", { options: ["--allow-mass-delete"] })
    expect(quiet).toMatchObject({ code: 0, stderr: "" })
    await compareSides(lab, project)
    expectNothingLeft(project.here)
  } catch (error) {
    console.error(
      `${name}: FUZZ_SEED=${SEED}, run ${project.runs}, step ${project.steps}\n${project.said.slice(-3000)}`,
    )
    throw error
  }
  console.log(`${name}: seed ${SEED}, ${project.runs} runs, ${project.kills} killed, ${project.steps} edits`)
})
