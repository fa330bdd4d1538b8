// flake.nix evaluates for every system, against a stub of nixpkgs: no network, no build, a private store.
import { afterAll, beforeAll, describe, expect, test } from "bun:test"
import { cpSync, mkdtempSync, rmSync } from "node:fs"
import { tmpdir } from "node:os"
import { join } from "node:path"

const project = join(import.meta.dir, "..")
const systems = ["aarch64-darwin", "aarch64-linux", "x86_64-darwin", "x86_64-linux"]
const nixIsHere = Bun.which("nix") !== null
if (!nixIsHere) console.log("flake.test.ts: skipped, nix is not on PATH")

describe.skipIf(!nixIsHere)("flake.nix", () => {
  // A copy of what the flake reads: the checkout may have untracked files and a large node_modules.
  let directory = ""
  beforeAll(() => {
    directory = mkdtempSync(join(tmpdir(), "edict-flake-"))
    for (const name of ["flake.nix", "package.json", "bun.lock", "edict.ts", "tests/stub-nixpkgs"])
      cpSync(join(project, name), join(directory, "flake", name), { recursive: true })
  })
  afterAll(() => {
    Bun.spawnSync(["chmod", "-R", "u+w", directory]) // store paths are read-only
    rmSync(directory, { recursive: true })
  })

  function nix(...words: string[]): string {
    const argv = [
      ...["nix", "--extra-experimental-features", "nix-command flakes", "--store", join(directory, "store")],
      ...["--option", "substituters", "", ...words],
      ...["--no-write-lock-file", "--override-input", "nixpkgs", "path:./tests/stub-nixpkgs"],
    ]
    const env = { PATH: process.env.PATH, HOME: directory }
    const { exitCode, stdout, stderr } = Bun.spawnSync(argv, { cwd: join(directory, "flake"), env })
    if (exitCode !== 0) throw new Error(`${argv.join(" ")}: exit code ${exitCode}\n${stderr}`)
    return stdout.toString()
  }

  /** {system: {name: …}} of one output, each value passed through the Nix function `f`. */
  function evaluate(output: string, f: string): Record<string, Record<string, string>> {
    const apply = `builtins.mapAttrs (_: builtins.mapAttrs (_: ${f}))`
    return JSON.parse(nix("eval", "--json", `path:.#${output}`, "--apply", apply))
  }

  const derivations = [
    ["packages", ["default"]],
    ["devShells", ["default"]],
    ["checks", ["edict", "starts"]],
  ] as const
  test.each(derivations)("%s: derivations for all four systems", (output, names) => {
    const bySystem = evaluate(output, 'd: "${d.system} ${builtins.unsafeDiscardStringContext d.drvPath}"')
    expect(Object.keys(bySystem)).toEqual(systems)
    for (const [system, byName] of Object.entries(bySystem)) {
      expect(Object.keys(byName)).toEqual([...names])
      for (const drv of Object.values(byName))
        expect(drv).toMatch(new RegExp(`^${system} /.*/[a-z0-9]{32}-[\\w.-]+\\.drv$`))
    }
  })

  test("apps: the program is that of the package", () => {
    const programs = evaluate("apps", 'app: "${app.type} ${builtins.unsafeDiscardStringContext app.program}"')
    const outputs = evaluate("packages", "d: builtins.unsafeDiscardStringContext d.outPath")
    expect(Object.keys(programs)).toEqual(systems)
    for (const system of systems)
      expect(programs[system]).toEqual({ default: `app ${outputs[system]?.default}/bin/edict` })
  })

  test("the wrapper puts its tools first, but ssh and nix of the user before its own", () => {
    const phase = evaluate("packages", "d: builtins.unsafeDiscardStringContext d.installPhase")
    const script = phase["x86_64-linux"]?.default ?? ""
    const tools = (flag: string) =>
      [...(script.match(`--${flag} PATH : (\\S+)`)?.[1] ?? "").matchAll(/-(\w+)\/bin/g)].map((m) => m[1])
    expect(tools("prefix")).toEqual(["bash", "coreutils", "git", "gnutar", "rsync"])
    expect(tools("suffix")).toEqual(["openssh", "nix"])
  })

  test("nix flake show and nix flake check accept it", () => {
    const shown = JSON.parse(nix("flake", "show", "--json", "path:."))
    expect(Object.keys(shown).toSorted()).toEqual(["apps", "checks", "devShells", "packages"])
    nix("flake", "check", "--no-build", "path:.")
  })
})
