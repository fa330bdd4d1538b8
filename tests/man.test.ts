// The man page: all of `edict --help`, and roff that no reader of man pages complains about.
import { describe, expect, test } from "bun:test"
import { USAGE, VERSION } from "../edict.ts"
import { REPOSITORY } from "./lab/lab"
import { manPage } from "./man"

const hasMandoc = Bun.which("mandoc") !== null
if (!hasMandoc) console.warn("man page: no mandoc here, so nothing reads it (tests/lab/setup.sh installs it)")

function mandoc(page: string, ...options: string[]): string {
  const { stdout, stderr } = Bun.spawnSync(["mandoc", ...options], { stdin: Buffer.from(page) })
  return stdout.toString() + stderr.toString()
}

/** What a reader sees, without bold and underline, in one line. */
const rendered = (page: string): string => flat(mandoc(page, "-Tutf8").replace(/.\x08/gs, ""))

const flat = (text: string): string => text.replace(/\s+/g, " ").trim()

const page = manPage(USAGE, "2024-02-29")

/** The lines of the options in the help: what is typed, and what it means. */
const options = USAGE.split("\n")
  .filter((line) => /^ {2}-/.test(line))
  .map((line) => line.trim().split(/\s{2,}/) as [string, string])

describe.skipIf(!hasMandoc)("the man page", () => {
  test("nothing in it is worth a warning", () => {
    expect(mandoc(page, "-Tlint", "-Wall")).toBe("")
  })

  test("has every option of the help, with its text", () => {
    const shown = rendered(page)
    expect(options.length).toBeGreaterThan(20)
    for (const [typed, meaning] of options) expect(shown).toContain(` ${typed} ${flat(meaning)} `)
  })

  test("has all other words of the help, too", () => {
    const shown = rendered(page)
    const words = USAGE.replace(/^edict \S+:/, "").replace(/^(usage|[a-z ]+):/gm, "")
    for (const word of new Set(words.split(/\s+/))) expect(shown).toContain(word)
    for (const heading of ["NAME", "SYNOPSIS", "DESCRIPTION", "OPTIONS", "EXAMPLES", "EXIT STATUS"])
      expect(shown).toContain(` ${heading} `)
    expect(shown).toStartWith("EDICT(1) ")
    expect(shown).toContain(`edict ${VERSION} `)
  })

  test("what roff would take for its own comes out as it is", () => {
    const odd = String.raw`a\fBb ~/.x 'quoted' "double" ${"`"}tick${"`"} x^2 .dot 'n it – →`
    const usage = `edict 1: title\n\nusage: edict HOST   runs\n\n  --odd \\E   ${odd}\n\n.TH is text\n\nexamples:\n  edict 'a' .   'n\n`
    const shown = rendered(manPage(usage, "2024-02-29"))
    for (const text of [odd, `--odd \\E`, ".TH is text", "edict 'a' . 'n"]) expect(shown).toContain(text)
    expect(mandoc(manPage(usage, "2024-02-29"), "-Tlint", "-Wwarning")).toBe("")
  })
})

test("an option without a text is not passed over", () => {
  expect(() => manPage("edict 1: t\n\n  --bare\n", "2024-02-29")).toThrow("--bare")
})

test("`bun run man` prints it, dated by $SOURCE_DATE_EPOCH", () => {
  const { stdout, exitCode } = Bun.spawnSync(["bun", "run", "--silent", "man"], {
    cwd: REPOSITORY,
    env: { ...process.env, SOURCE_DATE_EPOCH: "1709208000" },
  })
  expect(exitCode).toBe(0)
  expect(stdout.toString()).toBe(page)
})
