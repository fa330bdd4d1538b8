// The scripts that run over there are POSIX sh: shellcheck and the parsers of several shells say so.
import { describe, expect, test } from "bun:test"
import * as edict from "../edict"

const SCRIPTS = Object.entries(edict).filter(
  (entry): entry is [string, string] => entry[0].endsWith("_SCRIPT") && typeof entry[1] === "string",
)
const SHELLS = [["dash"], ["bash", "--posix"], ["busybox", "sh"], ["zsh", "--emulate", "sh"]]

/** Runs a program on a text; answers what it prints, "" where it finds nothing. */
function complaints(argv: string[], script: string): string {
  const result = Bun.spawnSync(argv, { stdin: Buffer.from(script), stdout: "pipe", stderr: "pipe" })
  return result.exitCode === 0 ? "" : `${result.stdout}${result.stderr}exit ${result.exitCode}`
}

test("there are scripts to look at", () => {
  expect(SCRIPTS.map(([name]) => name)).toContain("AGENT_SCRIPT")
  expect(SCRIPTS.map(([name]) => name)).toContain("COMMAND_SCRIPT")
})

describe.each(SCRIPTS)("%s", (_, script) => {
  test("is clean for shellcheck", () => {
    if (!Bun.which("shellcheck")) return console.log("skipped: no shellcheck")
    // SC2154: variables that the other script sets; SC2016: quoted awk and sh programs.
    expect(complaints(["shellcheck", "--shell=sh", "--exclude=SC2154,SC2016", "-"], script)).toBe("")
  })

  test.each(SHELLS)("is understood by %s", (...shell) => {
    if (!Bun.which(shell[0]!)) return console.log(`skipped: no ${shell[0]}`)
    expect(complaints([...shell, "-n"], script)).toBe("")
  })

  test("holds no data of a run and no bash", () => {
    expect(script).not.toMatch(/\[\[|<\(|\bfunction \w|\$'/)
    expect(edict.encodeScript(script)).not.toContain("\n")
  })
})
