/** Flakes for tests: they build with /bin/sh alone, without nixpkgs, and say what they were given. */

import { chmodSync, mkdirSync, readFileSync, writeFileSync } from "node:fs"
import { join } from "node:path"

/** What Nix calls the machine that the tests run on. */
export const SYSTEM = process.arch === "arm64" ? "aarch64-linux" : "x86_64-linux"

/** The names that can be run, `nix run .#NAME`; the comments in fixture/flake.nix say what each does. */
export const PROGRAMS = "args env cat exit7 status wait both spew suicide bump format".split(" ")

/** The names that can only be built. */
export const PACKAGES = "hello multi slow fails chain many big tree info input".split(" ")

/** How the flake differs from the usual one. */
export type FlakeOptions = {
  /** Default: that of this machine. */
  systems?: string[]
  /** Seconds that building `slow` takes. Default: 30. */
  slow?: number
  /** Paths of the closure of `chain`. Default: 3. */
  chain?: number
  /** Paths that `many` refers to. Default: 50. */
  many?: number
  /** Bytes of `big`. Default: 1 MiB. */
  big?: number
  /** Whether `nix flake check` fails. Default: false. */
  checkFails?: boolean
  /** Flake reference of an input `dep`: see writeInput. `.#input` is its value. Default: no input. */
  input?: string
  /** Further files, by relative path; they win over the usual ones. */
  files?: Record<string, string>
}

/** Makes a git repository of the current directory, with one commit. For client.sh(). */
export const GIT_INIT = "git init -q . && git add -A && git commit -q -m first"

/** Writes a flake into a directory: flake.nix, settings.json, and files for it to read and change. */
export function writeFlake(directory: string, options: FlakeOptions = {}): void {
  writeFiles(directory, {
    "flake.nix": flakeText(options.input),
    "settings.json": settingsText(options),
    "hello.txt": "hello\n",
    "version.txt": "1\n",
    "old.txt": "old\n",
    "untidy.txt": "blanks at the end   \n",
    "script.sh": "#!/bin/sh\necho script\n",
    ...options.files,
  })
  chmodSync(join(directory, "script.sh"), 0o644)
}

/** Writes the flake that stands behind the input `dep`. A new value changes what `nix flake update` locks. */
export function writeInput(directory: string, value: string): void {
  writeFiles(directory, { "flake.nix": `{ outputs = _: { value = ${JSON.stringify(value)}; }; }\n` })
}

/** Writes files by relative path; makes their directories. */
export function writeFiles(directory: string, files: Record<string, string>): void {
  for (const [name, text] of Object.entries(files)) {
    mkdirSync(join(directory, name, ".."), { recursive: true })
    writeFileSync(join(directory, name), text)
  }
}

/** The arguments that the program `args` printed. */
export function readArgs(stdout: string): string[] {
  const lines = stdout.split("\n").slice(0, -1)
  return lines.map((hex) => Buffer.from(hex, "hex").toString("utf8"))
}

function flakeText(input: string | undefined): string {
  const text = readFileSync(join(import.meta.dir, "fixture/flake.nix"), "utf8")
  return input ? text.replace("inputs = { };", () => `inputs.dep.url = ${JSON.stringify(input)};`) : text
}

function settingsText(options: FlakeOptions): string {
  const settings = {
    systems: options.systems ?? [SYSTEM],
    slow: options.slow ?? 30,
    chain: options.chain ?? 3,
    many: options.many ?? 50,
    big: options.big ?? 1 << 20,
    checkFails: options.checkFails ?? false,
  }
  return JSON.stringify(settings, null, 2) + "\n"
}
