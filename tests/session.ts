/**
 * bun run session: types the commands below into a shell of the lab, and writes what the terminal showed to
 * session.svg, which the README begins with. The same commands give the same bytes: what differs from run to run is
 * evened out, and the pace is made up.
 */

import { writeFileSync } from "node:fs"
import { dirname, join } from "node:path"
import { SYSTEM, writeFiles } from "./lab/flake"
import { startClient, startHost, type Client, type Host } from "./lab/lab"
import { SOURCES } from "./sources"
import { EDICT } from "./support"

const COMMANDS = [
  "edict big nix build .#my-package",
  "cat result",
  "edict big nix flake update .",
  "git commit -qam 'update inputs'",
  `printf '%s\\n' a b c | edict big nix run .#integration-test; echo "exit code $?"`,
  "edict big .#bump-versions",
  "git status --short",
  "cd; edict big nix run nixpkgs#hello",
]

export const SESSION = join(import.meta.dir, "session.svg")
const COLUMNS = 96

// ── The project ───

const PROJECT = "/root/project"

/** Builds with /bin/sh alone, as no network is used. */
const FLAKE = `{
  inputs.greetings.url = "git+file:///root/greetings";

  outputs = { self, greetings }:
    let
      build = name: script: derivation {
        inherit name;
        system = "${SYSTEM}";
        builder = "/bin/sh";
        args = [ "-euc" script ];
        PATH = "/usr/bin:/bin";
      };
      program = name: build name ''
        mkdir -p $out/bin
        cp \${./.}/\${name}.sh $out/bin/\${name}
        chmod +x $out/bin/\${name}
      '';
    in {
      packages.${SYSTEM} = {
        my-package = build "my-package" "sed 's/^/\${greetings.word}, /' \${./names.txt} >$out";
        integration-test = program "integration-test";
        bump-versions = program "bump-versions";
      };
    };
}
`

const FILES = { "flake.nix": FLAKE, ...SOURCES }

/** Stands for nixpkgs: what the registry of the host knows by that name. */
const NIXPKGS = `{
  outputs = _: {
    packages.${SYSTEM}.hello = derivation {
      name = "hello";
      system = "${SYSTEM}";
      builder = "/bin/sh";
      args = [ "-c" ''
        mkdir -p $out/bin
        printf '#!/bin/sh\\necho "Hello, world! I am on $(hostname)."\\n' >$out/bin/hello
        chmod +x $out/bin/hello
      '' ];
      PATH = "/usr/bin:/bin";
    };
  };
}
`

const ENVIRONMENT = { PATH: `${dirname(EDICT)}:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin` }

/** The project is locked to an input that is not the newest any more. */
async function prepare(host: Host, client: Client): Promise<void> {
  const greetings = (word: string) => ({ "flake.nix": `{ outputs = _: { word = "${word}"; }; }\n` })
  writeFiles(host.outside("/root/greetings"), greetings("Hello"))
  writeFiles(host.outside("/root/nixpkgs"), { "flake.nix": NIXPKGS })
  writeFiles(client.outside(PROJECT), FILES)
  await must(host, "git config --global user.email big@example.org && git config --global user.name big")
  await must(host, `cd greetings && git init -q -b main && ${commit("2025-11-03")}`)
  await must(host, "nix registry add nixpkgs path:/root/nixpkgs")
  const lock = "git init -q -b main && git add -A && edict -q big nix flake lock"
  await must(client, `cd project && ${lock} && ${commit("2025-11-04")}`)
  writeFiles(host.outside("/root/greetings"), greetings("Welcome"))
  await must(host, `cd greetings && ${commit("2025-12-01")}`)
}

/** At a fixed time, so that revisions are the same in every run. */
function commit(date: string): string {
  const time = `${date}T12:00:00Z`
  return `git add -A && GIT_AUTHOR_DATE=${time} GIT_COMMITTER_DATE=${time} git commit -qm change`
}

async function must(machine: Host | Client, script: string): Promise<void> {
  const { code, stdout, stderr } = await machine.sh(script, { env: ENVIRONMENT })
  if (code !== 0) throw new Error(`session: ${script}: exit code ${code}\n${stdout}${stderr}`)
}

// ── Recording ───

/** What the shell sends before its prompt, behind it, and when a command starts (OSC 133, "semantic prompts"). */
const MARKS = { prompt: "\x1b]133;A\x07", typing: "\x1b]133;B\x07", running: "\x1b]133;C\x07" }

/** Runs the commands on two new machines; answers all that the terminal got. */
async function record(): Promise<string> {
  await using host = await startHost({ name: "big", flakes: true })
  await using client = await startClient({ hosts: [host] })
  await prepare(host, client)
  return await type(client)
}

async function type(client: Client): Promise<string> {
  // Through env, as dash has a PS1 of its own.
  const prompt = [`PS1=${MARKS.prompt}\\w $ ${MARKS.typing}`, `PS0=${MARKS.running}`]
  const shell = ["env", ...prompt, "bash", "--noprofile", "--norc", "--noediting", "-i"]
  const sized = ["sh", "-c", `stty rows 40 cols ${COLUMNS} && exec "$@"`, "sh", ...shell]
  const running = client.spawn(sized, { cwd: PROJECT, env: ENVIRONMENT, tty: true })
  const prompts = (count: number) => running.waitFor(new RegExp(`^([^]*?${MARKS.typing}){${count}}`), 60_000)
  for (const [at, command] of COMMANDS.entries()) {
    await prompts(at + 1)
    running.write(`${command}\n`)
  }
  await prompts(COMMANDS.length + 1)
  const { stdout } = running
  running.write("exit\n")
  await running.result
  return stdout
}

/** What differs from run to run or from machine to machine, or is too long to read. */
export function evened(text: string): string {
  return text
    .replace(/\/nix\/store\/[0-9a-z]{32}-/g, "/nix/store/…-")
    .replace(/edict: nothing came home \([^)]*\)\r?\n/g, "") // what a slow machine is told
    .replace(/ \((?:[\d.]+ (?:h|min|s) ?)+\)(?=\r?\n)/g, "")
    .replace(/(\.cache\/edict\/client-)[0-9a-f]{8}/g, "$1…")
    .replace(/(\brev=[0-9a-f]{7})[0-9a-f]{33}/g, "$1…")
}

// ── The terminal ───

/** A character on the screen: its looks, as class names of the SVG, and when it appears, in milliseconds. */
type Cell = Readonly<{ character: string; look: string; time: number }>
export type Screen = readonly (readonly Cell[])[]

const LOOKS: Record<string, string> = { 1: "b", 31: "r", 32: "g", 33: "y", 34: "u", 35: "m", 36: "c" }
const PAUSES = { prompt: 500, word: 80, running: 600 }

/**
 * The lines of a terminal after all that was written to it. Throws for what it does not know: a new kind of output is
 * to be looked at.
 */
export function screenOf(written: string, columns = COLUMNS): Screen {
  const rows: Cell[][] = [[]]
  let [row, column, look, time] = [0, 0, "", 0]
  let own = "" // "p" in a prompt, "t" in what is typed
  const down = () => {
    row++
    rows[row] ??= []
  }
  const put = (character: string) => {
    if (column === columns) [column] = [0, down()]
    while (rows[row]!.length < column) rows[row]!.push({ character: " ", look: "", time })
    rows[row]![column++] = { character, look: `${own} ${look}`.trim(), time }
    if (own === "t" && character === " ") time += PAUSES.word
  }
  const mark = (sequence: string) => {
    time += sequence === MARKS.running ? PAUSES.running : PAUSES.prompt
    own = sequence === MARKS.prompt ? "p" : sequence === MARKS.typing ? "t" : ""
  }
  for (const [token] of written.matchAll(/\x1b\][^\x07]*\x07|\x1b\[[0-9;?]*[A-Za-z]|[^]/gu)) {
    if (token === "\r") column = 0
    else if (token === "\n") down()
    else if (token === "\x1b[K") rows[row]!.splice(column)
    else if (Object.values(MARKS).includes(token)) mark(token)
    else if (/^\x1b\[[\d;]*m$/.test(token)) look = looks(token.slice(2, -1), look)
    else if (token < " " || token === "\x7f") throw new Error(`no such terminal: ${JSON.stringify(token)}`)
    else put(token)
  }
  return rows.map((cells) => cells.slice(0, cells.findLastIndex(({ character }) => character !== " ") + 1))
}

/** The looks after "0", "1", "32;1", … */
function looks(codes: string, before: string): string {
  const now = new Set(before.split(" ").filter((name) => name !== ""))
  for (const code of codes.split(";")) {
    const name = LOOKS[String(Number(code))]
    if (Number(code) === 0) now.clear()
    else if (name === undefined) throw new Error(`no such terminal: colour ${code}`)
    else now.add(name)
  }
  return [...now].toSorted().join(" ")
}

// ── The picture ───

const [LINE, GAP, WIDTH, MARGIN] = [19, 7, 8.43, 16]

const STYLE = `
text{font:14px ui-monospace,SFMono-Regular,Menlo,Consolas,"DejaVu Sans Mono",monospace;fill:#d8dee9;white-space:pre}
.p{fill:#7f8ea3}.t,.b{font-weight:bold}.t{fill:#fff}
.r{fill:#ff7b72}.g{fill:#7ee787}.y{fill:#e3b341}.u{fill:#79c0ff}.m{fill:#e6a1ff}.c{fill:#76e3ea}
@media(prefers-reduced-motion:no-preference){[style]{animation:a 1ms backwards}@keyframes a{from{visibility:hidden}}}
`

/** The SVG of a screen: dark on any page, complete where nothing moves, and with nothing from elsewhere. */
export function pictureOf(screen: Screen, title: string): string {
  let y = MARGIN - GAP - 5
  const lines = screen.map((cells) => {
    y += LINE + (cells[0]?.look === "p" ? GAP : 0)
    return lineOf(cells, y)
  })
  const [width, height] = [Math.round(COLUMNS * WIDTH) + 2 * MARGIN, y + MARGIN + 5]
  return `<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 ${width} ${height}" width="${width}" height="${height}" role="img" xml:space="preserve">
<title>${escaped(title)}</title>
<style>${STYLE}</style>
<rect width="100%" height="100%" rx="8" fill="#161b22"/>
${lines.join("\n")}
</svg>
`
}

/** One line: a piece for each run of characters that look the same and appear at the same time. */
function lineOf(cells: readonly Cell[], y: number): string {
  const pieces: { text: string; look: string; time: number }[] = []
  for (const { character, look, time } of cells) {
    const last = pieces.at(-1)
    if (last && last.time === time && (last.look === look || character === " ")) last.text += character
    else pieces.push({ text: character, look, time })
  }
  const spans = pieces.map(({ text, look, time }) => {
    const looksLike = look === "" ? "" : ` class="${look}"`
    return `<tspan${looksLike} style="animation-delay:${time}ms">${escaped(text)}</tspan>`
  })
  return `<text x="${MARGIN}" y="${y}">${spans.join("")}</text>`
}

const escaped = (text: string): string =>
  text.replaceAll("&", "&amp;").replaceAll("<", "&lt;").replaceAll(">", "&gt;")

/** Records the session anew; answers its picture. */
export async function session(): Promise<string> {
  const written = evened(await record())
  return pictureOf(screenOf(written), `edict at work`)
}

if (import.meta.main) {
  const picture = await session()
  writeFileSync(SESSION, picture)
  console.log(`${SESSION}: ${picture.length} bytes`)
}
