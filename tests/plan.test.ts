// The plan: which words of a command name something here, which trees travel, where they lie over there.
import { afterAll, beforeAll, describe, expect, test } from "bun:test"
import {
  chmodSync,
  existsSync,
  mkdirSync,
  mkdtempSync,
  readFileSync,
  realpathSync,
  rmSync,
  symlinkSync,
  writeFileSync,
} from "node:fs"
import { tmpdir } from "node:os"
import { join } from "node:path"
import { remotePath } from "../edict.ts"
import { EDICT } from "./support"

type PlanJson = {
  host: string
  stateful: boolean
  implicit: boolean
  references: { index: number; word: string; kind: string; rewritten: string }[]
  trees: { local: string; remote: string; kind: string }[]
  cwd: string
  command: string[]
}

const FLAKE = "{ outputs = _: { }; }\n"
const STORE_PATH = "/nix/store/00000000000000000000000000000000-x"
const ODD = "a b%ü\nc"

let base: string

function run(cwd: string, script: string): string {
  const { exitCode, stdout, stderr } = Bun.spawnSync(["sh", "-ec", script], { cwd })
  if (exitCode !== 0) throw new Error(stderr.toString())
  return stdout.toString()
}

/** A git repository with a worktree, plain directories, odd names, and programs that tell if they are called. */
beforeAll(() => {
  base = realpathSync(mkdtempSync(join(tmpdir(), "edict-plan-")))
  const write = (name: string, text: string) => {
    mkdirSync(join(base, name, ".."), { recursive: true })
    writeFileSync(join(base, name), text)
  }
  for (const name of ["git", "git/sub", "dir", ODD, `git ${ODD}`, "locked", "dep", "deep/git/in"])
    write(`${name}/flake.nix`, FLAKE)
  for (const name of ["git/src/a.c", "git/t.tar", "dir/inner/x", "empty/x", "home/x", "deep/git/plain/x"])
    write(name, "")
  for (const name of [
    "legacy/default.nix",
    "legacy/shell.nix",
    "legacy/x.nix",
    "legacy/dir/default.nix",
    "file.nix",
  ])
    write(name, "1\n")
  const path = (at: string) => ({ locked: { type: "path", path: at, narHash: "sha256-x" } })
  const nodes = {
    dep: path(join(base, "dep")),
    gone: path(join(base, "gone")),
    near: path("./near"),
    root: {},
  }
  write("locked/flake.lock", JSON.stringify({ nodes, root: "root", version: 7 }))
  for (const name of ["git", `git ${ODD}`, "deep/git"])
    run(join(base, name), "git init -q; git add -A; git -c user.name=a -c user.email=b commit -qm x")
  run(join(base, "git"), "git worktree add -q ../worktree")
  symlinkSync(join(base, "git"), join(base, "link"))
  symlinkSync(STORE_PATH, join(base, "git/result"))
  symlinkSync(`${STORE_PATH}.drv`, join(base, "git/drv"))
  for (const name of ["ssh", "rsync", "nix", "nix-store", "scp", "sftp"]) {
    write(`bin/${name}`, `#!/bin/sh\necho "$0 $*" >>'${base}/calls'\n`)
    chmodSync(join(base, "bin", name), 0o755)
  }
})

afterAll(() => {
  rmSync(base, { recursive: true })
})

type Answer = { code: number; stdout: string; stderr: string }

/** `edict --dry-run …` below the fixture; in words and answers `@` is the fixture, `R` the root over there. */
function dryRun(cwd: string, argv: readonly string[]): Answer {
  const words = argv.map((word) => word.replaceAll("@", base))
  const { exitCode, stdout, stderr } = Bun.spawnSync([EDICT, "--dry-run", ...words], {
    cwd: join(base, cwd),
    env: { PATH: `${join(base, "bin")}:${process.env.PATH}`, HOME: join(base, "home") },
    stdin: "ignore",
  })
  const short = (output: Buffer) =>
    output
      .toString()
      .replace(/\.cache\/edict\/[A-Za-z0-9-]+\/tree\//g, "R/")
      .replace(/\.cache\/edict\/[A-Za-z0-9-]+\/meta\/[0-9a-f]{16}\/in\//g, "IN/")
      .replaceAll(`R${base}`, "R@")
      .replaceAll(base, "@")
  return { code: exitCode, stdout: short(stdout), stderr: short(stderr) }
}

type Expected = {
  /** Whether changes come home, and a dot if the default `.` applies. */
  mode?: "stateful" | "stateful ." | "."
  /** "INDEX KIND" or "INDEX KIND REWRITTEN" for each reference. */
  references?: string[]
  /** "KIND LOCAL" for each tree. */
  trees?: string[]
  command?: string[]
}
type Case = [cwd: string, argv: string[], expected: Expected]

const H_BUILD = ["h", "nix", "build"]

const cases: Case[] = [
  // git repositories: the whole repository travels, and words stay as they are
  ["git", [...H_BUILD, ".#x"], { mode: "stateful", references: ["1 flake"], trees: ["git @/git"] }],
  ["git", H_BUILD, { mode: "stateful .", trees: ["git @/git"] }],
  [
    "git",
    ["h", ".#x", "--", "./a"],
    {
      mode: "stateful",
      references: ["1 flake"],
      trees: ["git @/git"],
      command: ["nix", "run", ".#x", "--", "./a"],
    },
  ],
  ["git/src", H_BUILD, { mode: "stateful .", trees: ["git @/git"] }],
  ["git/src", [...H_BUILD, "../sub#x"], { mode: "stateful", references: ["1 flake"], trees: ["git @/git"] }],
  ["git/sub", [...H_BUILD, ".#x"], { mode: "stateful", references: ["1 flake"], trees: ["git @/git"] }],
  [
    "git",
    [...H_BUILD, "./sub#x^out,dev"],
    { mode: "stateful", references: ["1 flake"], trees: ["git @/git"] },
  ],
  ["git", [...H_BUILD, "#x"], { mode: "stateful", references: ["1 flake .#x"], trees: ["git @/git"] }],
  ["git", [...H_BUILD, ".?dir=sub#x"], { mode: "stateful", references: ["1 flake"], trees: ["git @/git"] }],
  ["worktree", [...H_BUILD, ".#x"], { mode: "stateful", references: ["1 flake"], trees: ["git @/worktree"] }],
  ["link", [...H_BUILD, ".#x"], { mode: "stateful", references: ["1 flake"], trees: ["git @/git"] }],
  [
    "deep/git/in",
    [...H_BUILD, ".#x"],
    { mode: "stateful", references: ["1 flake"], trees: ["git @/deep/git"] },
  ],
  // other directories: as path:, whatever repository they lie in over there
  [
    "dir",
    [...H_BUILD, ".#x"],
    { mode: "stateful", references: ["1 flake path:.#x"], trees: ["directory @/dir"] },
  ],
  ["dir", H_BUILD, { mode: "stateful .", trees: ["directory @/dir"], command: ["nix", "build", "path:."] }],
  [
    "dir/inner",
    H_BUILD,
    { mode: "stateful .", trees: ["directory @/dir"], command: ["nix", "build", "path:.."] },
  ],
  [
    "dir/inner",
    ["h", "nix", "develop", "-c", "x"],
    { mode: "stateful .", trees: ["directory @/dir"], command: ["nix", "develop", "path:..", "-c", "x"] },
  ],
  // URLs
  ["dir", [...H_BUILD, "path:."], { mode: "stateful", references: ["1 flake"], trees: ["directory @/dir"] }],
  [
    "git",
    [...H_BUILD, "path:.#x"],
    { mode: "stateful", references: ["1 flake"], trees: ["directory @/git"] },
  ],
  ["git", [...H_BUILD, "path:sub#x"], { references: ["1 flake"], trees: ["directory @/git/sub"] }],
  [
    "git",
    [...H_BUILD, "path:@/dir#x"],
    { references: ["1 flake path:../dir#x"], trees: ["directory @/dir"] },
  ],
  ["git", [...H_BUILD, "git+file:.#x"], { mode: "stateful", references: ["1 flake"], trees: ["git @/git"] }],
  [
    "git",
    [...H_BUILD, "git+file://@/git?dir=sub#x"],
    { mode: "stateful", references: ["1 flake git+file:.?dir=sub#x"], trees: ["git @/git"] },
  ],
  ["dir", [...H_BUILD, "git+file:../git?ref=main#x"], { references: ["1 flake"], trees: ["git @/git"] }],
  [
    "empty",
    [...H_BUILD, "file://@/git/t.tar"],
    { references: ["1 file file://$HOME/R@/git/t.tar"], trees: ["file @/git/t.tar"] },
  ],
  // from elsewhere, absolute, through a link
  ["git", [...H_BUILD, "@/git#x"], { mode: "stateful", references: ["1 flake .#x"], trees: ["git @/git"] }],
  ["empty", [...H_BUILD, "../git#x"], { references: ["1 flake"], trees: ["git @/git"] }],
  ["empty", [...H_BUILD, "../link#x"], { references: ["1 flake ../git#x"], trees: ["git @/git"] }],
  ["empty", [...H_BUILD, "@/dir#x"], { references: ["1 flake path:../dir#x"], trees: ["directory @/dir"] }],
  [
    "empty",
    [...H_BUILD, "../git#x", "../dir#y", "nixpkgs#z"],
    { references: ["1 flake", "2 flake path:../dir#y"], trees: ["directory @/dir", "git @/git"] },
  ],
  // odd names
  [
    ODD,
    [...H_BUILD, ".#x"],
    { mode: "stateful", references: ["1 flake path:.#x"], trees: [`directory @/${ODD}`] },
  ],
  [
    `git ${ODD}`,
    [...H_BUILD, ".#x"],
    { mode: "stateful", references: ["1 flake"], trees: [`git @/git ${ODD}`] },
  ],
  [
    "empty",
    [...H_BUILD, `../${ODD}#x`],
    { references: ["1 flake path:../a_b___c-5c679541ab#x"], trees: [`directory @/${ODD}`] },
  ],
  [
    "empty",
    [...H_BUILD, `../git ${ODD}#x`],
    { references: ["1 flake ../git_a_b___c-HASH#x"], trees: [`git @/git ${ODD}`] },
  ],
  [
    "empty",
    [...H_BUILD, "path:../a%20b%25%C3%BC%0Ac#x"],
    { references: ["1 flake path:../a_b___c-5c679541ab#x"], trees: [`directory @/${ODD}`] },
  ],
  // options with references
  [
    "git",
    [...H_BUILD, ".#x", "--override-input", "dep", "../dir"],
    {
      mode: "stateful",
      references: ["1 flake", "4 flake path:../dir"],
      trees: ["directory @/dir", "git @/git"],
    },
  ],
  [
    "git",
    [...H_BUILD, ".#x", "--override-input", "dep", "nixpkgs"],
    { mode: "stateful", references: ["1 flake"], trees: ["git @/git"] },
  ],
  [
    "git",
    [...H_BUILD, "--override-flake", "nixpkgs", "@/dir", ".#x"],
    {
      mode: "stateful",
      references: ["3 flake path:../dir", "4 flake"],
      trees: ["directory @/dir", "git @/git"],
    },
  ],
  [
    "git",
    [...H_BUILD, "--inputs-from", "../dir", "nixpkgs#x"],
    { references: ["2 flake path:../dir"], trees: ["directory @/dir"] },
  ],
  // files to evaluate: with what they may import
  ["legacy", [...H_BUILD, "-f", "x.nix", "a"], { references: ["2 path-in"], trees: ["directory @/legacy"] }],
  [
    "empty",
    [...H_BUILD, "-f", "@/legacy/x.nix", "a"],
    { references: ["2 path-in ../legacy/x.nix"], trees: ["directory @/legacy"] },
  ],
  ["git/src", [...H_BUILD, "-f", "../sub/flake.nix"], { references: ["2 path-in"], trees: ["git @/git"] }],
  ["empty", [...H_BUILD, "-f", "https://x/y", "a"], {}],
  ["git", [...H_BUILD, "--expr", "1"], {}],
  ["legacy", ["h", "nix-build"], { trees: ["directory @/legacy"] }],
  [
    "legacy",
    ["h", "nix-build", "x.nix", "-A", "a"],
    { references: ["0 path-in"], trees: ["directory @/legacy"] },
  ],
  ["legacy", ["h", "nix-build", "dir"], { references: ["0 path-in"], trees: ["directory @/legacy/dir"] }],
  ["legacy", ["h", "nix-shell", "--run", "make"], { trees: ["directory @/legacy"] }],
  ["legacy", ["h", "nix-shell", "-p", "hello"], {}],
  [
    "legacy",
    ["h", "nix-build", "-I", "p=@/dir", "-E", "1"],
    { references: ["1 path-in p=../dir"], trees: ["directory @/dir"] },
  ],
  // nix fmt; flake update, before and after its positionals changed their meaning
  ["git", ["h", "nix", "fmt"], { mode: "stateful .", trees: ["git @/git"] }],
  ["git/src", ["h", "nix", "fmt", "--", "a.c"], { mode: "stateful .", trees: ["git @/git"] }],
  ["git", ["h", "nix", "flake", "update"], { mode: "stateful .", trees: ["git @/git"] }],
  [
    "git",
    ["h", "nix", "flake", "update", "."],
    { mode: "stateful", references: ["2 flake"], trees: ["git @/git"] },
  ],
  ["git", ["h", "nix", "flake", "update", "nixpkgs"], { mode: "stateful .", trees: ["git @/git"] }],
  [
    "empty",
    ["h", "nix", "flake", "update", "--flake", "../git"],
    { references: ["3 flake"], trees: ["git @/git"] },
  ],
  ["empty", ["h", "nix", "flake", "update", "../git"], { references: ["2 flake"], trees: ["git @/git"] }],
  // modes
  ["home", ["h", "nix", "run", "nixpkgs#x", "-c", "./y"], {}],
  [
    "empty",
    ["--sync", "h", "nix", "eval", "--expr", "1"],
    { mode: "stateful", trees: ["directory @/empty"] },
  ],
  ["git/src", ["--sync", "h", "nix", "eval", "--expr", "1"], { mode: "stateful", trees: ["git @/git"] }],
  [
    "empty",
    ["--sync", ...H_BUILD, "../git#x"],
    { mode: "stateful", references: ["1 flake"], trees: ["directory @/empty", "git @/git"] },
  ],
  ["git", ["--no-sync", ...H_BUILD, ".#x"], { references: ["1 flake"], trees: ["git @/git"] }],
  ["git", ["--no-sync", ...H_BUILD], { mode: ".", trees: ["git @/git"] }],
  // result links and other outputs
  [
    "git",
    [...H_BUILD, ".#x", "-o", "out"],
    { mode: "stateful", references: ["1 flake", "3 path-out"], trees: ["git @/git"] },
  ],
  [
    "git",
    [...H_BUILD, ".#x", "-o", "@/empty/out"],
    { mode: "stateful", references: ["1 flake", "3 path-out ../empty/out"], trees: ["git @/git"] },
  ],
  ["git", [...H_BUILD, ".#x", "-o", ""], { mode: "stateful", references: ["1 flake"], trees: ["git @/git"] }],
  [
    "empty",
    [...H_BUILD, "../git#x", "--out-link", "d/out"],
    { references: ["1 flake", "3 path-out"], trees: ["git @/git"] },
  ],
  [
    "git",
    [...H_BUILD, ".#x", "--profile", "@/empty/p"],
    { mode: "stateful", references: ["1 flake", "3 path-out ../empty/p"], trees: ["git @/git"] },
  ],
  ["git", ["h", "nix", "path-info", "./result"], { references: [`1 store-link ${STORE_PATH}`] }],
  [
    "empty",
    ["h", "nix", "shell", "../git/result", "-c", "x"],
    { references: [`1 store-link ${STORE_PATH}`] },
  ],
  ["git", [...H_BUILD, "./drv^out"], { references: [`1 store-link ${STORE_PATH}.drv^out`] }],
  ["git", ["h", "nix-store", "-q", "result"], { references: [`1 store-link ${STORE_PATH}`] }],
  ["git", [...H_BUILD, STORE_PATH], {}],
  // locked local inputs come along
  [
    "locked",
    [...H_BUILD, ".#x"],
    { mode: "stateful", references: ["1 flake path:.#x"], trees: ["directory @/dep", "directory @/locked"] },
  ],
]

describe("--dry-run --json", () => {
  test.each(cases)("in %j: %j", (cwd, argv, expected) => {
    const { code, stdout, stderr } = dryRun(cwd, ["--json", ...argv])
    expect({ code, stderr }).toEqual({ code: 0, stderr: "" })
    const plan = JSON.parse(stdout) as PlanJson
    const words = argv.slice(argv.indexOf("h") + 1)
    const mode = expected.mode ?? ""
    const hashless = (text: string) => text.replace(/(git_a_b___c)-[0-9a-f]{10}/, "$1-HASH")

    expect(Object.keys(plan)).toEqual([
      "host",
      "stateful",
      "implicit",
      "references",
      "trees",
      "cwd",
      "command",
    ])
    expect(plan).toMatchObject({
      host: "h",
      stateful: mode.startsWith("stateful"),
      implicit: mode.endsWith("."),
    })
    const references = plan.references.map(({ index, kind, word, rewritten }) =>
      word === rewritten ? `${index} ${kind}` : `${index} ${kind} ${hashless(rewritten)}`,
    )
    expect(references).toEqual(expected.references ?? [])
    expect(plan.trees.map(({ kind, local }) => `${kind} ${local}`)).toEqual(expected.trees ?? [])

    // The command is what was typed but for the rewritten words, `index` counting from the one after nix.
    const typed = words[0]?.startsWith("nix") ? [...words] : ["nix", "run", ...words]
    for (const { index, word, rewritten } of plan.references) {
      expect(typed[index + 1]).toBe(word)
      typed[index + 1] = rewritten
    }
    expect(plan.command).toEqual(expected.command ?? typed)

    // Everything lies at its own place below one root, in names that need no quotes anywhere.
    for (const { local, remote } of plan.trees) expect(remote).toBe(placeOf(local))
    expect(plan.cwd).toBe(placeOf(`@/${cwd.replace(/^link/, "git")}`))
    for (const path of [plan.cwd, ...plan.trees.map(({ remote }) => remote)])
      expect(path.replace("@", "")).toMatch(/^[A-Za-z0-9._/-]+$/)
  })

  const placeOf = (local: string): string =>
    remotePath("", local.replace("@", base)).replace(`/tree${base}`, "R@")

  test("the root is .cache/edict below the home directory, or the configured directory", () => {
    const { stdout } = Bun.spawnSync([EDICT, "--dry-run", "--json", "h", "nix", "eval", "nixpkgs#x"], {
      cwd: base,
    })
    expect((JSON.parse(stdout.toString()) as PlanJson).cwd).toMatch(
      new RegExp(`^\\.cache/edict/[A-Za-z0-9-]+-[0-9a-f]{8}/tree${base}$`),
    )
    const config = join(base, "config.toml")
    for (const [directory, start] of [
      ["/var/trees/", "/var/trees/"],
      ["~/x/y", "x/y/"],
    ] as const) {
      writeFileSync(config, `[hosts.h]\ndirectory = "${directory}"\n`)
      const plan = dryRun("git", ["--json", "--config", config, ...H_BUILD])
      expect((JSON.parse(plan.stdout) as PlanJson).cwd).toStartWith(start)
    }
  })
})

describe("remotePath", () => {
  test("keeps plain names, so that relative paths lead from tree to tree", () => {
    expect(remotePath("root", "/home/ed/My-proj_1.2")).toBe("root/tree/home/ed/My-proj_1.2")
    expect(remotePath("root", "/")).toBe("root/tree")
  })

  test("tells apart what looks alike, and is the same every time", () => {
    const names = [
      "a b",
      "a_b",
      "a%b",
      "a\nb",
      "aüb",
      "a\u0308b",
      "ä",
      " ",
      "a  b",
      "$(x)",
      "'",
      "~",
      "-",
      "ü".repeat(120),
      "ü".repeat(121),
    ]
    const places = names.map((name) => remotePath("r", `/${name}/x`))
    expect(new Set(places).size).toBe(names.length)
    for (const place of places) {
      expect(place).toMatch(/^[A-Za-z0-9._/-]+$/)
      expect(place.length).toBeLessThan(160)
    }
    expect(places).toEqual(names.map((name) => remotePath("r", `/${name}/x`)))
  })
})

describe("--dry-run", () => {
  const upload = (from: string, more = "") =>
    `rsync -lptI --chmod=Du+rwx --whole-file --from0 --files-from=- -e ${more || "ssh"} -- ${from} h:IN/`
  const fetch = (ssh = "ssh -- h") => [
    "# result links that it made, after their closures came home",
    `${ssh} 'nix-store --export PATHS…' | nix-store --import`,
    "nix-store --realise PATH --indirect --add-root LINK",
  ]
  const texts: [cwd: string, argv: string[], lines: string[]][] = [
    [
      "git",
      [...H_BUILD, ".#x"],
      [
        "# git @/git: what changed since the last upload",
        upload("@/git/"),
        "# run",
        "ssh -- h 'cd R@/git && nix build '\\''.#x'\\'''",
        ...fetch(),
        "ssh -- h 'tar -cf - -C R@/git CHANGED…' | tar -xf - -C STAGING   # then file by file into @/git",
      ],
    ],
    [
      "empty",
      ["-p", "22", "-i", "a key", ...H_BUILD, "../dir#x"],
      [
        "# directory @/dir: what changed since the last upload",
        upload("@/dir/", "'ssh -p 22 -i '\\''a key'\\'''"),
        "# run",
        "ssh -p 22 -i 'a key' -- h 'cd R@/empty && nix build '\\''path:../dir#x'\\'''",
        ...fetch("ssh -p 22 -i 'a key' -- h"),
        "ssh -p 22 -i 'a key' -- h 'tar -cf - -C R@/dir CHANGED…' | tar -xf - -C STAGING   # then file by file into @/dir: flake.lock only",
      ],
    ],
    [
      "git",
      ["--no-sync", ...H_BUILD, "--no-link"],
      [
        "# git @/git: what changed since the last upload",
        upload("@/git/"),
        "# run",
        "ssh -- h 'cd R@/git && nix build --no-link'",
        ...fetch(),
      ],
    ],
    [
      "empty",
      ["h", "nix", "eval", "--expr", "1"],
      ["# run", "ssh -- h 'cd R@/empty && nix eval --expr 1'", ...fetch()],
    ],
  ]
  test.each(texts)("in %j: %j", (cwd, argv, lines) => {
    const { code, stdout, stderr } = dryRun(cwd, argv)
    expect({ code, stderr }).toEqual({ code: 0, stderr: "" })
    expect(stdout.split("\n")).toEqual([...lines, ""])
  })

  test("prints lines that a shell takes, and names that a terminal takes", () => {
    const { stdout } = dryRun(ODD, [...H_BUILD, ".#x", "--option", "x", "a'b\"$(touch pwned)\\"])
    const comment = stdout.split("\n")[0]
    expect(comment).toBe("# directory @/a b%ü\\x0ac: what changed since the last upload")
    const run = /^# run\n(ssh[^]*?)\n# /m.exec(stdout)?.[1] ?? ""
    const words = Bun.spawnSync(["bash", "-c", `ssh() { printf '%s\\n' "$3"; }; ${run}`]).stdout.toString()
    const inner = Bun.spawnSync([
      "bash",
      "-c",
      `cd() { :; }; nix() { printf '%s\\0' "$@"; }; ${words}`,
    ]).stdout.toString()
    expect(inner.split("\0")).toEqual(["build", "path:.#x", "--option", "x", "a'b\"$(touch pwned)\\", ""])
  })

  const refused: [cwd: string, argv: string[], what: string][] = [
    ["empty", H_BUILD, ". is no flake: there is no flake.nix in @/empty or above it"],
    ["empty", [...H_BUILD, "./nowhere#x"], "./nowhere#x: there is no @/empty/nowhere here"],
    ["empty", [...H_BUILD, "./x#y"], "./x#y is no flake: @/empty/x is a file"],
    [
      "deep/git/plain",
      [...H_BUILD, ".#x"],
      ".#x is no flake: there is no flake.nix in @/deep/git/plain or above it, up to @/deep/git",
    ],
    ["empty", [...H_BUILD, "-f", "gone.nix"], "gone.nix: there is no @/empty/gone.nix here"],
    ["empty", ["-h\u001b", ...H_BUILD], "unknown option -h\\x1b"],
    ["git", ["--", "-oProxyCommand=x", "nix", "build"], "host -oProxyCommand=x has characters"],
    ["git", ["--", "-h", "nix", "build"], "host -h starts with -"],
  ]
  test.each(refused)("in %j: %j is refused", (cwd, argv, what) => {
    const { code, stdout, stderr } = dryRun(cwd, argv)
    expect({ code, stdout }).toEqual({ code: 254, stdout: "" })
    expect(stderr).toStartWith(`edict: ${what}`)
    expect(stderr).toMatch(/^[^\n]*; try: [^\n]+\n$/)
  })
})

/** Runs after all others: none of them may have left a trace. */
describe("a plan is only a plan", () => {
  test("no program that reaches a host was called, and nothing was written", () => {
    expect(existsSync(join(base, "calls"))).toBeFalse()
    expect(run(join(base, "home"), "find . ! -name .")).toBe("./x\n")
    expect(run(join(base, "git"), "git status --porcelain")).toBe("?? drv\n?? result\n")
    expect(run(base, "find dir empty legacy locked dep -newer bin/sftp -type f")).toBe("")
    // The fake ones do tell.
    Bun.spawnSync([join(base, "bin/ssh"), "x"])
    expect(readFileSync(join(base, "calls"), "utf8")).toContain("ssh x")
  })
})
