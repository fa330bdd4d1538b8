// The program as it is shipped: from source, compiled, and imported.
import { beforeAll, expect, setDefaultTimeout, test } from "bun:test"
import { mkdtempSync, rmSync, writeFileSync } from "node:fs"
import { tmpdir } from "node:os"
import { join } from "node:path"

const project = join(import.meta.dir, "..")
const compiled = join(project, "dist/edict")
const { version } = await Bun.file(join(project, "package.json")).json()

function run(argv: string[], cwd = project) {
  const { exitCode, stdout, stderr } = Bun.spawnSync(argv, { cwd, stdin: "ignore" })
  return { exitCode, stdout: stdout.toString(), stderr: stderr.toString() }
}

/** Calls `use` with a temporary directory that has the given files. */
function withDirectory(files: Record<string, string>, use: (directory: string) => void) {
  const directory = mkdtempSync(join(tmpdir(), "edict-build-"))
  try {
    for (const [name, text] of Object.entries(files)) writeFileSync(join(directory, name), text)
    use(directory)
  } finally {
    rmSync(directory, { recursive: true })
  }
}

setDefaultTimeout(120_000)
beforeAll(() => {
  const built = run(["npm", "run", "--silent", "ensure-build"])
  if (built.exitCode !== 0) throw new Error(built.stdout + built.stderr)
})

const ways = [
  ["dist/edict", [compiled]],
  ["bun edict.ts", ["bun", join(project, "edict.ts")]],
  ["./edict.ts", [join(project, "edict.ts")]],
] as const

test.each(ways)("%s --version", (_, argv) => {
  const { exitCode, stdout, stderr } = run([...argv, "--version"])
  expect({ exitCode, stderr }).toEqual({ exitCode: 0, stderr: "" })
  expect(stdout).toContain(version)
})

test.each(ways)("%s --help", (_, argv) => {
  const { exitCode, stdout, stderr } = run([...argv, "--help"])
  expect({ exitCode, stderr }).toEqual({ exitCode: 0, stderr: "" })
  expect(stdout).toContain("edict")
  expect(stdout).toContain("HOST")
})

test("importing edict.ts prints nothing, starts nothing and ends", () => {
  const script = `
    import childProcess from 'node:child_process'
    const started = []
    const watch = (target, names) => {
      for (const name of names) {
        const original = target[name]
        target[name] = (...words) => (started.push(words[0]), original(...words))
      }
    }
    watch(Bun, ['spawn', 'spawnSync'])
    watch(childProcess, ['spawn', 'spawnSync', 'exec', 'execSync', 'execFile', 'execFileSync'])
    await import(${JSON.stringify(join(project, "edict.ts"))})
    if (started.length > 0) console.log('started', started)
    if (process.exitCode) console.log('exit code', process.exitCode)
  `
  withDirectory({ "importer.js": script }, (directory) => {
    const { exitCode, stdout, stderr } = run(["bun", "importer.js"], directory)
    expect({ exitCode, stdout, stderr }).toEqual({ exitCode: 0, stdout: "", stderr: "" })
  })
})

// Bun on its own reads bunfig.toml, which may name code to run, and .env of the current directory.
const hostile = {
  "bunfig.toml": 'preload = ["./preload.ts"]\n',
  "preload.ts": 'console.log("code of the current directory ran")\n',
  ".env": "EDICT_HOST=host-of-dotenv\n",
}
test.each(ways.filter(([name]) => name !== "bun edict.ts"))(
  "%s takes nothing from the current directory",
  (_, argv) => {
    withDirectory(hostile, (directory) => {
      expect(run([...argv, "--help"], directory)).toEqual(run([...argv, "--help"]))
      const { stdout, stderr } = run([...argv, "--dry-run", "nix", "build", "nixpkgs#hello"], directory)
      expect(stdout + stderr).not.toContain("host-of-dotenv")
    })
  },
)

test("start-up time (printed, not judged)", () => {
  withDirectory({ "empty.ts": "" }, (directory) => {
    const build = ["bun", "build", "--compile", "--minify", "--bytecode", "--outfile", "empty", "empty.ts"]
    expect(run(build, directory).exitCode).toBe(0)
    const median = (argv: string[]) => {
      const times = Array.from({ length: 21 }, () => {
        const start = Bun.nanoseconds()
        run(argv)
        return (Bun.nanoseconds() - start) / 1e6
      })
      return times.toSorted((a, b) => a - b)[10] ?? NaN
    }
    const empty = median([join(directory, "empty")])
    const edict = median([compiled, "--version"])
    console.log(
      `start-up: edict --version ${edict.toFixed(1)} ms, an empty program ${empty.toFixed(1)} ms, ratio ${(edict / empty).toFixed(2)}`,
    )
  })
})
