/** Completions in the real shells. */

import { afterAll, beforeAll, describe, expect, setDefaultTimeout, test } from "bun:test"
import { chmodSync, mkdirSync, mkdtempSync, rmSync, symlinkSync, writeFileSync } from "node:fs"
import { tmpdir } from "node:os"
import { join } from "node:path"
import { completionScript, UsageError } from "../edict"
import { GIT_INIT, writeFlake } from "./lab/flake"
import { EDICT } from "./support"

setDefaultTimeout(60_000)

const SHELLS = ["bash", "zsh", "fish"] as const
type Shell = (typeof SHELLS)[number]

let home: string

beforeAll(() => {
  home = mkdtempSync(join(tmpdir(), "edict-completion-"))
  for (const directory of ["bin", ".config/edict", ".ssh/conf.d", "p/directory"])
    mkdirSync(join(home, directory), { recursive: true })
  symlinkSync(EDICT, join(home, "bin/edict"))
  writeFileSync(
    join(home, ".config/edict/config.toml"),
    '[hosts.big]\ntags = ["ci", "arm"]\n[hosts.small]\ntags = ["ci"]\n',
  )
  writeFileSync(
    join(home, ".ssh/config"),
    'Include conf.d/*\nHost jump "quoted" *.example !not\n  User x\nhost=equals\nMatch host matched\n',
  )
  writeFileSync(join(home, ".ssh/conf.d/one"), "Host included\n")
  writeFlake(join(home, "p"))
  run(["sh", "-c", `git config --global user.name x; git config --global user.email x@y; ${GIT_INIT}`])
  for (const shell of SHELLS) writeFileSync(join(home, `edict.${shell}`), completionScript(shell))
})

afterAll(() => {
  run(["chmod", "-R", "u+w", home])
  rmSync(home, { recursive: true })
})

function run(argv: string[], input = ""): string {
  const { stdout, stderr, exitCode } = Bun.spawnSync(argv, {
    cwd: join(home, "p"),
    env: { PATH: `${join(home, "bin")}:${process.env["PATH"]}`, HOME: home, TERM: "xterm", LANG: "C.UTF-8" },
    stdin: Buffer.from(input),
  })
  if (exitCode !== 0)
    throw new Error(`${argv.join(" ")}: ${exitCode} ${stdout.toString()} ${stderr.toString()}`)
  return stdout.toString()
}

/** The words that a shell offers at the end of a line, as they would stand in it. */
const OFFERS: Record<Shell, (line: string) => string[]> = {
  bash: (line) => {
    // As bash itself does: words are cut at blanks and at : = @, which are words of their own.
    const pieces = line.match(/[:=@]+|[^\s:=@]+/g) ?? []
    const words = /\s$/.test(line) || /[:=@]$/.test(line) ? [...pieces, ""] : pieces
    const script = `source ~/edict.bash
      COMP_LINE=$1 COMP_POINT=\${#1}; shift; COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); _edict
      printf '%s\\n' "\${COMPREPLY[@]}"`
    // What it replaces goes back to the last of these, and @ belongs to what is replaced.
    const token = /\S*$/.exec(line)![0]
    const before = token.slice(0, token.length - /(@[^:=@]*|[^:=@]*)$/.exec(token)![0].length)
    return lines(run(["bash", "-c", script, "bash", line, ...words])).map((word) => before + word)
  },
  zsh: (line) => [...new Set(lines(run(["zsh", "-f", join(home, "capture.zsh"), line])))],
  fish: (line) =>
    lines(run(["fish", "-c", `source ~/edict.fish; complete -C $argv[1]`, line])).map(
      (word) => word.split("\t")[0]!,
    ),
}

const lines = (output: string): string[] =>
  output
    .split(/\r?\n/)
    .filter((line) => line !== "")
    .sort()

/** Drives a real zsh on a pseudo-terminal; its compadd notes what it is given and lets nothing through. */
const CAPTURE = `
zmodload zsh/zpty
zpty z zsh -f -i
() { local line; zpty -w z 'PROMPT=; RPROMPT=; unsetopt prompt_sp zle_bracketed_paste 2>/dev/null; stty -echo 2>/dev/null; autoload -Uz compinit && compinit -u -D; source ~/edict.zsh; source ~/noted.zsh; print READ''Y'
  while zpty -r z line; do [[ $line == *READY* ]] && break; done
  zpty -n -w z "$1"$'\\t'
  while zpty -r z line; do
    line=\${line//[$'\\r\\n']/}
    case $line in *'<end>'*) break ;; *'<'*'>'*) print -r -- "\${\${line##*<}%%>*}" ;; esac
  done
} "$1"
zpty -d z
`
const NOTED = `
noted() {
  functions[compadd]='
    local -a found; local prefix=$IPREFIX
    builtin compadd -O found "$@"
    (( $#found )) && printf "<%s>\\n" \${found/#/$prefix}
    builtin compadd "$@"'
  _main_complete
  unfunction compadd
  printf '<end>\\n'
}
zle -C noted complete-word noted
bindkey '^I' noted
`

const NIX = "nix nix-build nix-shell nixos-rebuild".split(" ")
const HOSTS = ["@all", "@arm", "@ci", "big", "equals", "included", "jump", "quoted", "small"]

describe.each(SHELLS)("%s", (shell) => {
  beforeAll(() => {
    writeFileSync(join(home, "capture.zsh"), CAPTURE)
    writeFileSync(join(home, "noted.zsh"), NOTED)
  })
  const offers = (line: string) => OFFERS[shell](line)

  const exact: [line: string, words: string[]][] = [
    ["edict ", [...HOSTS, "nix"]],
    ["edict b", ["big"]],
    ["edict @", ["@all", "@arm", "@ci"]],
    ["edict @c", ["@ci"]],
    ["edict -v --jobs 3 -p 22 sm", ["small"]],
    ["edict --pi", ["--pick"]],
    ["edict -q --re", ["--report"]],
    ["edict --no-", ["--no-sync", "--no-tty"]],
    ["edict --completion ", ["bash", "fish", "zsh"]],
    ["edict --pick --system x86", ["x86_64-darwin", "x86_64-linux"]],
    ["edict --doctor big sm", ["small"]],
    ["edict -- b", ["big"]],
    ["edict big n", NIX],
    ["edict big nix-b", ["nix-build"]],
    ["edict n", ["nix"]],
    ["edict big nix bui", ["build"]],
    ["edict nix bui", ["build"]],
    ["edict -v big,small nix flake upd", ["update"]],
    ["edict big nix build .#he", [".#hello"]],
    ["edict nix run .#exi", [".#exit7"]],
    ["edict big .#he", [".#hello"]],
    ["edict big nix build --no-li", ["--no-link"]],
  ]
  test.each(exact)("%s", (line, words) => expect(offers(line)).toEqual([...words].sort()))

  test("a list of hosts", () => {
    const found = offers("edict big,s").map((word) => word.replace(/^big,/, ""))
    expect(found).toEqual(["small"])
  })

  test("options, without those that are for edict itself", () => {
    const found = offers("edict --")
    for (const option of [
      "--sync",
      "--no-sync",
      "--pick",
      "--system",
      "--features",
      "--jobs",
      "--report",
      "--doctor",
      "--clean",
      "--hosts",
      "--help",
    ])
      expect(found).toContain(option)
    expect(found).not.toContain("--complete-hosts")
    expect(found).not.toContain("--link-suffix")
  })

  test("nothing is run on the way", () => {
    const trap = join(home, "bin/nixos-rebuild")
    writeFileSync(trap, `#!/bin/sh\ntouch ${home}/ran\n`)
    chmodSync(trap, 0o755)
    offers("edict big nixos-rebuild sw")
    offers("edict big nix run .#bump -- $(touch ran)")
    expect(run(["sh", "-c", "ls ~/ran ran 2>/dev/null; git status --short"])).toBe("")
  })
})

test("bash itself: what it has cut into words is put together again, and the end is put in its place", () => {
  // A line editor on a terminal: the completed line is what it runs. The function says what it was given.
  const rc = `source ~/edict.bash; PS1=; edict() { if [ "$1" = --complete-hosts ]; then command edict "$@"; else printf '<%s>' "$@"; echo END; fi; }\n`
  writeFileSync(join(home, "rc.bash"), rc)
  const completed = (line: string): string => {
    const screen = run(
      ["script", "-qec", "bash --noprofile --rcfile ~/rc.bash -i", "/dev/null"],
      `${line}\t\nexit\n`,
    )
    return /^<.*>(?=END)/m.exec(screen)?.[0] ?? screen
  }
  expect(completed("edict @c")).toBe("<@ci>")
  expect(completed("edict small,bi")).toBe("<small,big>")
  expect(completed("edict --completion=x --completion fi")).toBe("<--completion=x><--completion><fish>")
  expect(completed("edict big nix build .#hel")).toBe("<big><nix><build><.#hello>")
  expect(completed("edict ssh://root@big nix bui")).toBe("<ssh://root@big><nix><build>")
  expect(completed(`edict big nix build path:${home}/p#hel`)).toBe(`<big><nix><build><path:${home}/p#hello>`)
})

test("an unknown shell is an error that names those that are known", () => {
  for (const shell of ["tcsh", "", "constructor"]) expect(() => completionScript(shell)).toThrow(UsageError)
})

test("the scripts are clean", () => {
  expect(run(["bash", "-n", join(home, "edict.bash")])).toBe("")
  expect(run(["zsh", "-n", join(home, "edict.zsh")])).toBe("")
  expect(run(["fish", "-n", join(home, "edict.fish")])).toBe("")
  expect(run(["sh", "-c", `edict --completion bash | cmp - ~/edict.bash`])).toBe("")
})
