// README, CHANGELOG and CONTRIBUTING say what the program does: options, keys, codes, commands, links, the picture.
import { describe, expect, test } from "bun:test"
import {
  existsSync,
  mkdirSync,
  mkdtempSync,
  readFileSync,
  realpathSync,
  rmSync,
  writeFileSync,
} from "node:fs"
import { tmpdir } from "node:os"
import { join } from "node:path"
import { EDICT_FAILED, parseArguments, parseConfig, SSH_FAILED, USAGE, VERSION } from "../edict.ts"
import { REPOSITORY } from "./lab/lab"
import { evened, pictureOf, screenOf, session, SESSION } from "./session"
import { EDICT } from "./support"

const read = (name: string): string => readFileSync(join(REPOSITORY, name), "utf8")
const README = read("README.md")
const DOCUMENTS = ["README.md", "CONTRIBUTING.md", "CHANGELOG.md"]

/** What stands under a heading, without that of deeper ones. */
function section(title: string): string {
  const text = README.split(`\n## ${title}\n`)[1]
  if (text === undefined) throw new Error(`README.md has no section ${title}`)
  return text.split("\n## ")[0]!
}

/** The blocks of code of one language. */
const blocks = (text: string, language: string): string[] =>
  [...text.matchAll(/^```(\w*)\n([^]*?)^```$/gm)]
    .filter(([, name]) => name === language)
    .map(([, , code]) => code!)

/** Options that a text names: -v, --dry-run. */
const optionsIn = (text: string): string[] => [
  ...new Set([...text.matchAll(/(?<![\w-])--?[A-Za-z][\w-]*/g)].map(([option]) => option)),
]

/** Cells of the first column of a table, without its head. */
const firstColumn = (text: string): string[] =>
  [...text.matchAll(/^\| *([^|]*?) *\|/gm)].map(([, cell]) => cell!).slice(2)

describe("the command line", () => {
  const helped = optionsIn(USAGE.split("\n\nexamples:")[0]!)
  const documented = [...README.matchAll(/`([^`\n]+)`/g)].flatMap(([, code]) => optionsIn(code!))

  test("every option of the help is in the README", () => {
    expect(helped.length).toBeGreaterThan(30)
    expect(helped.filter((option) => !documented.includes(option))).toEqual([])
  })

  test("every option of its table is in the help", () => {
    const table = firstColumn(section("Usage")).flatMap(optionsIn)
    expect(table.length).toBeGreaterThan(30)
    expect(table.filter((option) => !helped.includes(option))).toEqual([])
  })

  test("so are the forms of the command, the variables and the examples", () => {
    const forms = [...USAGE.matchAll(/^(?:usage:| {6}) (edict .*?)(?: {2}|$)/gm)].map(([, form]) => form!)
    const variables = [...USAGE.split("\nenvironment:")[1]!.matchAll(/\b[A-Z]+_[A-Z]+\b/g)].map(
      ([name]) => name,
    )
    const examples = [...USAGE.matchAll(/^ {2}(edict .*?) {2}/gm)].map(([, example]) => example!)
    expect([forms.length, variables.length, examples.length]).toEqual([4, 3, 4])
    const usage = section("Usage")
    for (const form of forms) expect(usage).toContain(`\n${form}`)
    for (const variable of variables) expect(README).toContain(variable)
    for (const example of examples) expect(usage).toContain(`\n${example.replace("root@", "")} `)
  })

  const examples = blocks(README, "sh").flatMap((code) => [
    ...code.matchAll(/^(?:.* && )?edict (.*?)(?: +#.*)?$/gm),
  ])

  test.each(examples.map(([, words]) => words!))("the example is understood: edict %s", async (words) => {
    const { command, options } = await parseArguments(words.split(" "), {})
    expect(command.length > 0 || ["hosts", "doctor"].includes(options.action)).toBeTrue()
  })

  test("there are enough of them", () => {
    expect(examples.length).toBeGreaterThan(18)
  })
})

describe("the hosts file", () => {
  const [example = ""] = blocks(section("Hosts file"), "toml")

  /** The keys that are allowed, as the error for an unknown one says. */
  async function allowed(text: string): Promise<string[]> {
    const error = await parseConfig(text, "f").catch((thrown: Error) => thrown)
    return /allowed: (.*)$/.exec((error as Error).message)![1]!.split(", ")
  }

  test("the README's one is accepted, and has every key", async () => {
    const { hosts } = await parseConfig(example, "README.md")
    expect(Object.keys(hosts)).toEqual(["big"])
    const { hosts: tables, ...top } = Bun.TOML.parse(example) as { hosts: { big: object } }
    expect([...Object.keys(top), "hosts"].toSorted()).toEqual((await allowed("nonsense = 1")).toSorted())
    const keys = await allowed("[hosts.x]\nnonsense = 1")
    expect(Object.keys(tables.big).toSorted()).toEqual(keys.toSorted())
  })
})

test("the table of exit codes says what the help and the program say", () => {
  const codes = firstColumn(section("Exit codes"))
  const said = USAGE.split("exit codes:")[1]!
  expect(codes).toEqual([`0–${EDICT_FAILED - 1}`, String(EDICT_FAILED), String(SSH_FAILED), "128+n"])
  for (const code of [`${EDICT_FAILED} edict failed`, `${SSH_FAILED} ssh failed`, "128+n", "130"])
    expect(said).toContain(code)
  expect(section("Exit codes")).toMatch(/\b130\b/)
})

describe("what the documents refer to", () => {
  const { scripts, description, version } = JSON.parse(read("package.json")) as {
    scripts: Record<string, string>
    description: string
    version: string
  }

  test.each(DOCUMENTS)("scripts of package.json in %s", (name) => {
    const named = [...read(name).matchAll(/\b(?:npm|bun) run (?!-)([\w:-]+)|\bnpm (test)\b/g)]
    const unknown = named
      .map(([, script, known]) => script ?? known!)
      .filter((script) => !(script in scripts))
    expect(unknown).toEqual([])
    if (name !== "CHANGELOG.md") expect(named.length).toBeGreaterThan(2)
  })

  /** As GitHub makes them. */
  const anchors = (text: string): string[] =>
    [...text.matchAll(/^#+ (.*)$/gm)].map(([, title]) =>
      title!
        .toLowerCase()
        .replace(/[^\w\s-]/g, "")
        .replaceAll(" ", "-"),
    )

  test.each(DOCUMENTS)("links in %s", (name) => {
    const links = [...read(name).matchAll(/\]\(([^)\s]+)\)/g)].map(([, link]) => link!)
    const broken = links.filter((link) => {
      if (link.startsWith("https:")) return false
      const [file = "", anchor] = link.split("#")
      const target = file === "" ? name : file
      return !existsSync(join(REPOSITORY, target)) || (anchor && !anchors(read(target)).includes(anchor))
    })
    expect(broken).toEqual([])
  })

  test("files of the repository", () => {
    const code = DOCUMENTS.flatMap((name) => [...read(name).matchAll(/(?:tests|\.ci)\/[\w./-]*\w\/?/g)])
    const files = [...new Set(code.map(([file]) => file))]
    expect(files.length).toBeGreaterThan(4)
    expect(files.filter((file) => !existsSync(join(REPOSITORY, file)))).toEqual([])
  })

  test("outputs of the flake", () => {
    const outputs = [...section("Install").matchAll(/`(\w+\.default)`/g)].map(([, output]) => output!)
    expect(outputs).toEqual(["overlays.default", "homeModules.default", "nixosModules.default"])
    for (const output of outputs) expect(read("flake.nix")).toContain(`\n      ${output} = `)
  })

  test("one sentence says everywhere what it is", () => {
    expect(README).toStartWith(`# edict\n\n${description}.\n`)
    expect(read("flake.nix")).toStartWith(`{\n  description = "${description}";\n`)
    expect(USAGE.split("\n")[0]!.toLowerCase()).toBe(`edict ${VERSION}: ${description.toLowerCase()}`)
  })

  test("one version", () => {
    expect(version).toBe(VERSION)
    expect(read("CHANGELOG.md")).toContain(`\n## [${VERSION}] - `)
  })
})

test("the plan in the README is what --dry-run prints", () => {
  const base = realpathSync(mkdtempSync(join(tmpdir(), "edict-readme-")))
  const home = join(base, "home/you")
  const cwd = join(home, "project")
  mkdirSync(cwd, { recursive: true })
  writeFileSync(join(cwd, "flake.nix"), "{ outputs = _: { }; }\n")
  Bun.spawnSync(["git", "init", "-q"], { cwd })
  const { stdout, stderr } = Bun.spawnSync([EDICT, "--dry-run", "big", "nix", "build", ".#my-package"], {
    cwd,
    env: { PATH: process.env.PATH, HOME: home },
  })
  rmSync(base, { recursive: true })
  const plan = stdout
    .toString()
    .replaceAll(base, "")
    .replace(/\.cache\/edict\/[\w-]+\//g, ".cache/edict/laptop-…/")
    .replace(/\/meta\/[0-9a-f]+\//g, "/meta/…/")
  expect(stderr.toString()).toBe("")
  expect(blocks(section("How it works"), "sh")).toEqual([plan])
})

describe("the recorded session", () => {
  const picture = read("tests/session.svg")

  test("is what its script records", async () => {
    expect(SESSION).toBe(join(REPOSITORY, "tests/session.svg"))
    expect(await session()).toBe(picture)
  }, 120_000)

  test("is small, and needs and tells nothing from elsewhere", () => {
    expect(picture.length).toBeLessThan(12_000)
    expect(picture).not.toMatch(/<script|<image|<foreignObject|@import|url\(|href|\bon\w+=/i)
    expect(picture.replace('xmlns="http://www.w3.org/2000/svg"', "")).not.toContain("http")
    for (const own of [REPOSITORY, "/tmp/", "edict-lab"]) expect(picture).not.toContain(own)
  })

  const at = (ms: number) => `style="animation-delay:${ms}ms"`

  test("shows what a terminal shows", () => {
    const written =
      "\x1b]133;A\x07~ $ \x1b]133;B\x07ls a\r\n\x1b]133;C\x07wait 50%\r\x1b[Kdone\x1b[0;1;31m<!>\x1b[0m  \r\n12345678901x\r\nold\rn"
    const texts = [...pictureOf(screenOf(written, 11), "a & b").matchAll(/<text[^>]*>(.*)<\/text>/g)]
    expect(texts.map(([, text]) => text!)).toEqual([
      `<tspan class="p" ${at(500)}>~ $ </tspan><tspan class="t" ${at(1000)}>ls </tspan><tspan class="t" ${at(1080)}>a</tspan>`,
      `<tspan ${at(1680)}>done</tspan><tspan class="b r" ${at(1680)}>&lt;!&gt;</tspan>`,
      `<tspan ${at(1680)}>12345678901</tspan>`,
      `<tspan ${at(1680)}>x</tspan>`,
      `<tspan ${at(1680)}>nld</tspan>`,
    ])
    expect(() => screenOf("\x1b[2J")).toThrow("no such terminal")
    expect(() => screenOf("\x1b[38;5;1m")).toThrow("no such terminal")
  })

  test("evens out what differs from run to run", () => {
    const store = `/nix/store/${"0a".repeat(16)}-x`
    const lines = `edict: nothing came home (2.0 s)\r\nresult -> ${store} (0.3 s)\r\nrev=${"0123456789".repeat(4)}' 1 min (1 min 4 s)\n~/.cache/edict/client-0123abcd/tree\n`
    expect(evened(lines)).toBe(
      "result -> /nix/store/…-x\r\nrev=0123456…' 1 min\n~/.cache/edict/client-…/tree\n",
    )
  })
})
