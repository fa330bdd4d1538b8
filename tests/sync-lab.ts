/**
 * Cases of sync back as data: what is made here, what the command does over there, what happens here meanwhile,
 * and what must be true afterwards. See sync.test.ts for the cases.
 */

import { expect } from "bun:test"
import fs from "node:fs"
import { join } from "node:path"
import { startClient, startHost, type Client, type Host, type HostOptions, type Result } from "./lab/lab"
import { EDICT } from "./support"

/**
 * What lies at a path: the text of a file, "*TEXT" for an executable one, "-> TARGET" for a link, "/" for a
 * directory, null for nothing.
 */
export type Contents = Record<string, string | null>

export type Step = {
  /** Script here, in the project, before edict starts. */
  before?: string
  /** Script over there, in the remote tree, before edict starts: somebody works there by hand. */
  byHand?: string
  /** What the command does, in the remote project. Default: nothing. */
  command?: string
  /** Script here while the command, after its work, waits. */
  meanwhile?: string
  /** Directory of the project that edict is started in. */
  from?: string
  options?: string[]
  env?: Record<string, string>
  host?: string
  /** Exit code. Default: 0. */
  code?: number
  /** What must be here, and over there, afterwards. */
  here?: Contents
  there?: Contents
  /** All that lies in the conflict directories. Default: nothing. */
  kept?: Contents
  /** What edict must say, and what not. */
  says?: (string | RegExp)[]
  hushes?: (string | RegExp)[]
  /** Script here that must succeed afterwards. */
  proof?: string
  /** Script in the remote tree that must succeed afterwards. */
  proofThere?: string
  /** false: the sides may differ afterwards. Default: whether the exit code is 0. */
  equal?: boolean
}

export type Case = { name: string; setup?: string; plain?: true; directory?: string; steps: Step[] }

export type Lab = {
  host: Host
  hosts: Host[]
  client: Client
  store: string
  /** Runs edict with a command that is a script for /bin/sh over there. */
  edict(cwd: string, script: string, how?: RunHow): Promise<Result>
  argv(script: string, how?: RunHow): string[]
  /** Where the remote counterpart of a local directory lies, seen from outside. */
  remote(directory: string, host?: Host): string
  [Symbol.asyncDispose](): Promise<void>
}
export type RunHow = { options?: string[]; env?: Record<string, string>; host?: string; timeout?: number }

/** A client and hosts whose stores share one path, so that `nix shell` starts a command without evaluation. */
export async function startLab(
  hosts: Partial<HostOptions>[] = [{}],
  program: string[] = [EDICT],
  first: "with a first run" | "without a first run" = "with a first run",
): Promise<Lab> {
  const machines = await Promise.all(
    hosts.map((options, at) => startHost({ name: `h${at || ""}`, ...options })),
  )
  const client = await startClient({ hosts: machines })
  const added = await Promise.all(
    [client, ...machines].map((machine) => machine.sh("echo sync >/tmp/sync && nix-store --add /tmp/sync")),
  )
  const store = added[0]!.stdout.trim()
  const argv = (script: string, { options = [], host = "h" }: RunHow = {}) => {
    const command = ["nix", "shell", store, "--command", "/bin/sh", "-c", script]
    return [...program, "--sync", ...options, host, ...command]
  }
  const self: Lab = {
    host: machines[0]!,
    hosts: machines,
    client,
    store,
    argv,
    edict: (cwd, script, how = {}) =>
      client.run(argv(script, how), { cwd, env: how.env ?? {}, timeout: how.timeout ?? 60_000 }),
    remote: (directory, host = machines[0]!) => {
      const cache = host.outside("/root/.cache/edict")
      const roots = fs.readdirSync(cache).filter((name) => name !== "run" && !/\.\d+$/.test(name))
      if (roots.length !== 1) throw new Error(`one root expected over there: ${roots.join(" ")}`)
      return directory
        .split("/")
        .filter((name) => name !== "")
        .reduce((above, name) => join(above, remoteName(above, name)), join(cache, roots[0]!, "tree"))
    },
    async [Symbol.asyncDispose]() {
      await Promise.all([client.stop(), ...machines.map((machine) => machine.stop())])
    },
  }
  if (first === "without a first run") return self
  for (const { name } of machines) {
    const { code, stderr } = await self.edict("/root/.ssh", "true", { options: ["--no-sync"], host: name })
    if (code !== 0) throw new Error(`the first run on ${name} failed: ${stderr}`)
  }
  return self
}

/** Names with other characters have a hash over there. */
function remoteName(above: string, name: string): string {
  if (/^[A-Za-z0-9._-]+$/.test(name)) return name
  const readable = `${name.replace(/[^A-Za-z0-9._-]/g, "_")}-`
  return fs.readdirSync(above).find((candidate) => candidate.startsWith(readable)) ?? `${readable}missing`
}

/** Every path below a directory with what lies there; names as bytes (latin1). `.git` and edict's own are left out. */
export function snapshot(directory: string): Map<string, string> {
  const found = new Map<string, string>()
  const walk = (prefix: string) => {
    for (const item of fs.readdirSync(pathOf(directory, prefix), { encoding: "buffer" })) {
      const name = prefix + item.toString("latin1")
      if (/(^|\/)(\.git|\.edict-conflicts)$/.test(name)) continue
      const what = describe(directory, name)!
      if (what === "/") walk(`${name}/`)
      found.set(name, what)
    }
  }
  walk("")
  return found
}

const pathOf = (directory: string, name: string): Buffer =>
  Buffer.concat([Buffer.from(`${directory}/`), Buffer.from(name, "latin1")])

/** What lies at a path, as Contents has it; undefined for nothing. */
export function describe(directory: string, name: string): string | undefined {
  const file = pathOf(directory, name)
  const stat = fs.lstatSync(file, { throwIfNoEntry: false })
  if (!stat) return undefined
  if (stat.isDirectory()) return "/"
  if (stat.isSymbolicLink()) return `-> ${fs.readlinkSync(file, "latin1")}`
  if (!stat.isFile()) return "special"
  return `${(stat.mode & 0o100) !== 0 ? "*" : ""}${fs.readFileSync(file, "latin1")}`
}

function expectContents(directory: string, contents: Contents, where: string): void {
  const wanted = Object.entries(contents).map(([name, what]) => [
    name,
    what === null ? undefined : bytes(what),
  ])
  const found = Object.keys(contents).map((name) => [name, describe(directory, bytes(name))])
  expect({ [where]: Object.fromEntries(found) }).toEqual({ [where]: Object.fromEntries(wanted) })
}

const bytes = (text: string): string => Buffer.from(text).toString("latin1")

/** Runs one case in a project of its own. */
export async function runCase(lab: Lab, item: Case): Promise<void> {
  const cwd = `/root/${item.directory ?? item.name.replace(/[^A-Za-z0-9]+/g, "-").slice(0, 40)}`
  const made = await lab.client.run([
    "/bin/sh",
    "-ec",
    `mkdir "$1"; cd "$1"; ${item.plain ? "" : "git init -q"}`,
    "sh",
    cwd,
  ])
  expect(made.stderr).toBe("")
  if (item.setup)
    await script(
      lab.client,
      cwd,
      `${item.setup}${item.plain ? "" : "\ngit add -A; git commit -qm first --allow-empty"}`,
    )
  for (const step of item.steps) await runStep(lab, cwd, step, item.plain ?? false)
}

async function script(machine: Client | Host, cwd: string, text: string): Promise<void> {
  const result = await machine.run(["/bin/sh", "-ec", text], { cwd })
  if (result.code !== 0) throw new Error(`${text}\nexit ${result.code}\n${result.stdout}${result.stderr}`)
}

let count = 0

async function runStep(lab: Lab, cwd: string, step: Step, plain: boolean): Promise<void> {
  const host = lab.hosts.find(({ name }) => name === (step.host ?? "h"))!
  const mark = `/tmp/mark-${process.pid}-${++count}`
  if (step.before) await script(lab.client, cwd, step.before)
  if (step.byHand) await script(host, insideOf(host, lab.remote(cwd, host)), step.byHand)
  const wait = `touch ${mark}.at; until [ -e ${mark}.go ]; do sleep 0.05; done`
  const how: RunHow = { options: step.options ?? [], env: step.env ?? {}, host: host.name }
  const command = step.meanwhile ? `( ${step.command ?? ":"} ); ${wait}` : (step.command ?? ":")
  const run = lab.edict(join(cwd, step.from ?? ""), command, how)
  if (step.meanwhile) {
    await Promise.race([appears(host.outside(`${mark}.at`)), run])
    await script(lab.client, cwd, step.meanwhile)
    fs.writeFileSync(host.outside(`${mark}.go`), "")
  }
  const result = await run
  const code = step.code ?? 0
  if (result.code !== code)
    throw new Error(`exit ${result.code}, not ${code}\n${result.stdout}${result.stderr}`)
  expect(result.stderr).not.toContain("this is a bug")
  const [here, there] = [lab.client.outside(cwd), lab.remote(cwd, host)]
  expectContents(here, step.here ?? {}, "here")
  expectContents(there, step.there ?? {}, "there")
  if (process.env.SYNC_CASE) console.log(result.stdout + result.stderr)
  const kept: Contents = conflictsOf(here)
  expect({ kept }).toEqual({ kept: asBytes(step.kept ?? {}) })
  for (const text of step.says ?? []) expect(result.stderr).toMatch(text)
  for (const text of step.hushes ?? []) expect(result.stderr).not.toMatch(text)
  if (code === 0) expect(result.stderr).not.toContain("conflict")
  expectNothingLeft(here)
  if (step.proof) await script(lab.client, cwd, step.proof)
  if (step.proofThere) await script(host, insideOf(host, there), step.proofThere)
  if (step.equal ?? code === 0) await expectEqual(lab, cwd, there, plain)
}

const asBytes = (contents: Contents): Contents =>
  Object.fromEntries(
    Object.entries(contents).map(([name, what]) => [bytes(name), what === null ? null : bytes(what)]),
  )

/** A path of a machine, given from outside, as the machine itself sees it. */
const insideOf = (host: Host, outside: string): string =>
  outside.slice(host.outside("/root").length - "/root".length)

/** Waits until a file is there. */
export async function appears(file: string, timeout = 30_000): Promise<void> {
  for (const end = Date.now() + timeout; !fs.existsSync(file); await Bun.sleep(10))
    if (Date.now() > end) throw new Error(`${file} did not appear`)
}

/** All files in the conflict directories of a project, by their names there, those of every run together. */
export function conflictsOf(directory: string): Record<string, string> {
  const git = fs.lstatSync(join(directory, ".git"), { throwIfNoEntry: false })
  const places = [".edict-conflicts", ...(git?.isDirectory() ? [".git/edict/conflicts"] : [])]
  const runs = places.flatMap((place) => {
    const parent = join(directory, place)
    return fs.existsSync(parent) ? fs.readdirSync(parent).map((run) => join(parent, run)) : []
  })
  const files = runs.flatMap((run) => [...snapshot(run)].filter(([, what]) => what !== "/"))
  return Object.fromEntries(files)
}

/** Stages and locks need no hands. */
export function expectNothingLeft(directory: string): void {
  const left = [".git/edict/stage", ".edict-stage"].filter((name) => fs.existsSync(join(directory, name)))
  const beside = [...snapshot(directory).keys()].filter((name) => name.includes(".edict-stage"))
  expect([...left, ...beside]).toEqual([])
}

/** What belongs to the tree is the same on both sides; what is only there must be ignored. */
export async function expectEqual(lab: Lab, cwd: string, there: string, plain: boolean): Promise<void> {
  const [local, remote] = [snapshot(lab.client.outside(cwd)), snapshot(there)]
  const directories = (names: Map<string, string>) => [...names].filter(([, what]) => plain || what !== "/")
  const ignored = plain
    ? new Set<string>()
    : await ignoredBy(lab, cwd, new Set([...local.keys(), ...remote.keys()]))
  const both = ([name]: [string, string]) => !ignored.has(name)
  expect({ there: Object.fromEntries(directories(remote).filter(both)) }).toEqual({
    there: Object.fromEntries(directories(local).filter(both)),
  })
}

export async function ignoredBy(lab: Lab, cwd: string, names: Set<string>): Promise<Set<string>> {
  if (names.size === 0) return names
  const stdin = Buffer.from([...names].map((name) => `./${name}\0`).join(""), "latin1")
  const argv = ["git", "check-ignore", "--no-index", "-z", "--stdin"]
  const { bytes: answer, code, stderr } = await lab.client.run(argv, { cwd, stdin })
  if (code > 1) throw new Error(stderr)
  return new Set(
    Buffer.from(answer)
      .toString("latin1")
      .split("\0")
      .map((name) => name.slice(2)),
  )
}
