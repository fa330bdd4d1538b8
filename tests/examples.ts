/** The main examples on any two machines: what a user does in a project, and what must be true afterwards. */

import { expect } from "bun:test"
import { existsSync, readdirSync, readFileSync } from "node:fs"
import { join } from "node:path"
import { GIT_INIT, writeFiles, writeFlake, writeInput } from "./lab/flake"
import type { Client, Host, Result, Running, RunOptions } from "./lab/lab"
import { EDICT } from "./support"
import { snapshot } from "./sync-lab"

/** A project on a client, and the host that its commands run on. */
export type Pair = { client: Client; host: Host; dir: string }

/** Runs edict in the project of a pair; Nix starts what follows. */
export const edict = (pair: Pair, words: string[], options: RunOptions = {}): Promise<Result> =>
  pair.client.run([EDICT, ...words], { cwd: pair.dir, ...options })

/** Words of a command that runs a script of sh over there, with a built package on its PATH. */
export const script = (text: string, ...words: string[]): string[] =>
  ["nix", "shell", ".#hello", "-c", "sh", "-c", text, "sh"].concat(words)

/** Makes the project: a flake in a git repository, with an input that lies over there, and some odd files. */
export async function makePair(pair: Pair): Promise<void> {
  const { client, dir } = pair
  const made = await client.sh(`mkdir ${dir}`)
  expect(made.stderr).toBe("")
  await setInput(pair, "one")
  writeFlake(client.outside(dir), { input: `path:${inputOf(pair)}` })
  writeFiles(client.outside(dir), {
    ...Object.fromEntries(ODD_NAMES.map((name) => [name, `in ${name}\n`])),
    ...Object.fromEntries(Array.from({ length: 40 }, (_, at) => [`many/${at % 4}/file${at}`, `${at}\n`])),
  })
  await must(
    client,
    dir,
    "ln -s nowhere dangling; ln -s hello.txt link; ln -s /etc far; chmod 755 -- -x; chmod 600 tab*",
  )
  await must(client, dir, `${GIT_INIT} && : >ignored.txt && echo ignored.txt >.git/info/exclude`)
}

/** Names that a shell, tar, xargs or find could take for something else. */
export const ODD_NAMES = [
  "-x",
  "--files-from=x",
  "@at",
  "# hash",
  "; semi",
  " blank ",
  "tab\there",
  "new\nline",
  "back\\slash",
  "star*[a]?",
  "quote'\"$(id)",
  "ümlaut 日本",
  `${"long".repeat(55)}/${"longer".repeat(40)}`,
]

const inputOf = ({ dir }: Pair): string => `/srv${dir}-input`

async function setInput(pair: Pair, value: string): Promise<void> {
  await pair.host.sh(`mkdir -p ${inputOf(pair)}`)
  writeInput(pair.host.outside(inputOf(pair)), value)
}

async function must(machine: Client | Host, cwd: string, text: string): Promise<string> {
  const { code, stdout, stderr } = await machine.sh(text, { cwd })
  if (code !== 0) throw new Error(`${text}\nexit ${code}\n${stdout}${stderr}`)
  return stdout
}

async function well(pair: Pair, words: string[], code = 0): Promise<Result> {
  const result = await edict(pair, words)
  if (result.code !== code || /this is a bug|conflict/.test(result.stderr))
    throw new Error(`edict ${words.join(" ")}: exit ${result.code}\n${result.stdout}${result.stderr}`)
  return result
}

const read = ({ client, dir }: Pair, name: string): string =>
  readFileSync(client.outside(join(dir, name)), "utf8")

/** What a result link here leads to. */
const built = async (pair: Pair, path = "result"): Promise<string> =>
  must(pair.client, pair.dir, `cat ${path}`)

/** Build with a result link, a small edit, an update of flake.lock, an exit code, changes that come home. */
export async function mainExamples(pair: Pair): Promise<void> {
  const { name } = pair.host
  expect((await well(pair, [name, "nix", "build", ".#chain"])).stdout).toBe("")
  expect(await built(pair, "result/next/next")).toBe("end\n")
  expectSame(pair)

  await must(
    pair.client,
    pair.dir,
    "git add flake.lock; git commit -qm lock; echo edited >hello.txt; rm many/1/file1",
  )
  await well(pair, [name, "nix", "build", ".#hello"])
  expect(await built(pair)).toBe("edited\n")
  expectSame(pair)

  const lock = read(pair, "flake.lock")
  await setInput(pair, "two")
  await well(pair, [name, "nix", "flake", "update"])
  expect(read(pair, "flake.lock")).not.toBe(lock)
  await well(pair, [name, "nix", "build", ".#input"])
  expect(await built(pair)).toBe("two")

  await well(pair, [name, "nix", "run", ".#status", "--", "7"], 7)
  await changesComeHome(pair)
}

/** Edits, deletions, new directories, links, odd names and modes of a command come home. */
async function changesComeHome(pair: Pair): Promise<void> {
  const work = `
    echo more >>version.txt; rm old.txt link; mkdir -p new/deep; echo new >new/deep/file; chmod +x script.sh
    ln -s ../nowhere new/link; for name; do echo there >>"$name"; done; rm -r many/2; echo there >ignored.txt
    ln -s other dangling2; mkdir empty; rm far; mkdir far; echo inside >far/file; printf 'a\\0b' >binary; exit 9`
  const result = await well(pair, [pair.host.name, ...script(work, ...ODD_NAMES)], 9)
  expect(result.stdout).toBe("")
  expect(read(pair, "version.txt")).toBe("1\nmore\n")
  for (const name of ODD_NAMES) expect(read(pair, name)).toBe(`in ${name}\nthere\n`)
  expect(read(pair, "far/file")).toBe("inside\n")
  expect(read(pair, "ignored.txt")).toBe("")
  expect(read(pair, "binary")).toBe("a\0b")
  expect(existsSync(pair.client.outside(join(pair.dir, "many/2")))).toBeFalse()
  expectSame(pair)
  // And all of that is what both sides agree on: a run without changes is quiet.
  expect((await well(pair, [pair.host.name, "nix", "run", ".#exit7"], 7)).stderr).not.toContain(
    "changed here",
  )
}

/** What belongs to the tree is the same on both sides. */
export function expectSame(pair: Pair): void {
  const files = (directory: string) =>
    Object.fromEntries(
      [...snapshot(directory)].filter(
        ([name, what]) => what !== "/" && !/^(result.*|ignored\.txt|\.edict-.*)$/.test(name),
      ),
    )
  expect(files(remoteOf(pair))).toEqual(files(pair.client.outside(pair.dir)))
}

/** Where the project lies over there, seen from outside. */
export function remoteOf({ host, dir }: Pair): string {
  const cache = host.outside("/root/.cache/edict")
  const found = readdirSync(cache)
    .map((root) => join(cache, root, "tree", dir))
    .filter((tree) => existsSync(tree) && !/\.\d+\/tree/.test(tree))
  if (found.length !== 1) throw new Error(`one remote tree expected: ${found.join(" ")}`)
  return found[0]!
}

/** Starts a command with children over there, that changes a file, says "start" and goes on for minutes. */
export async function startBrood(pair: Pair): Promise<Running> {
  const text = `echo changed >version.txt; sleep 331 & (sleep 332 & sleep 333) & echo start; sleep 334; echo no`
  const running = pair.client.spawn([EDICT, pair.host.name, ...script(text)], { cwd: pair.dir })
  await running.waitFor("start")
  return running
}

/** Waits until nothing of it is left over there; throws after ten seconds. */
export async function expectNoBrood({ host }: Pair): Promise<void> {
  const left = async () => (await host.processes()).filter((line) => /sleep 33\d|edict\/run/.test(line))
  for (const end = Date.now() + 10_000; (await left()).length > 0; await Bun.sleep(200))
    if (Date.now() > end) throw new Error(`still there: ${(await left()).join("\n")}`)
}
