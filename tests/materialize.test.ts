// Without Nix here: everything but closures, and the files of results as plain files.
import {
  afterAll,
  afterEach,
  beforeAll,
  beforeEach,
  describe,
  expect,
  setDefaultTimeout,
  test,
} from "bun:test"
import { lstatSync, mkdtempSync, readdirSync, readFileSync, readlinkSync, rmSync } from "node:fs"
import { tmpdir } from "node:os"
import { join } from "node:path"
import { bytes, layOut, moveInto, type Change, type Listing, type Output } from "../edict"
import { writeInput } from "./lab/flake"
import { nixAvailable, type Host } from "./lab/lab"
import { EDICT, project, type Project, type ProjectOptions } from "./support"

setDefaultTimeout(120_000)

/** For nix-build: outputs that lead to each other, and links of every kind. */
const DEFAULT_NIX = `let
  build = name: more: script: derivation ({
    inherit name;
    system = builtins.currentSystem;
    builder = "/bin/sh";
    args = [ "-euc" script ];
    PATH = "/bin:/usr/bin";
  } // more);
in rec {
  text = build "text.txt" { } "echo text >$out";
  lib = build "lib" { } ''
    mkdir -p $out/lib/sub $out/share
    echo z >$out/lib/libz.so.1
    ln -s libz.so.1 $out/lib/libz.so
    echo data >$out/share/data
    ln -s ../../share/data $out/lib/sub/data
  '';
  bin = build "bin" { } ''
    mkdir -p $out/bin
    printf '#!/bin/sh\\necho tool\\n' >$out/bin/tool
    chmod +x $out/bin/tool
    ln $out/bin/tool $out/bin/twin
    echo plain >"$out/bin/a b'ü"
    echo odd >"$out/bin/$(printf '\\\\x\\nline')"
  '';
  env = build "env" { inherit lib bin text; } ''
    mkdir -p $out/deep $out/empty
    ln -s $lib/lib $out/lib
    ln -s $bin/bin $out/bin
    ln -s $out/bin/tool $out/deep/tool
    ln -s $text $out/deep/text
    ln -s ../../$(basename $lib)/share/data $out/deep/data
    ln -s nothing $out/dangling
  '';
  odd = build "odd" { inherit text; } ''
    mkdir -p $out/sub/sub $out/.git
    echo evil >$out/.git/config
    ln -s /etc/passwd $out/passwd
    ln -s ../../../etc/passwd $out/sub/passwd
    ln -s /nix/store/00000000000000000000000000000000-gone $out/gone
    ln -s ../gone $out/sub/inner
    ln -s ../../../gone $out/sub/outer
    ln -s self $out/self
    ln -s ../.. $out/sub/sub/up
    ln -s $out/sub $out/sub/again
    ln -s $text $out/good
  '';
  link = build "link" { inherit text; } "ln -s $text $out";
}
`

/** What lies in a directory: text of files, "*TEXT" of executable ones, "-> TEXT" of links, "/" for directories. */
function contents(directory: string, prefix = ""): Record<string, string> {
  return Object.fromEntries(
    readdirSync(join(directory, prefix)).flatMap((item): [string, string][] => {
      const name = join(prefix, item)
      const file = join(directory, name)
      const stat = lstatSync(file)
      if (stat.isSymbolicLink()) return [[name, `-> ${readlinkSync(file)}`]]
      if (stat.isDirectory()) return [[name, "/"], ...Object.entries(contents(directory, name))]
      return [[name, (stat.mode & 0o100 ? "*" : "") + readFileSync(file, "utf8")]]
    }),
  )
}

/** What each of them is as plain files. */
const TEXT = { "text.txt": "text\n" }
const LIB = {
  lib: "/",
  "lib/sub": "/",
  "lib/sub/data": "data\n",
  "lib/libz.so.1": "z\n",
  "lib/libz.so": "z\n",
  share: "/",
  "share/data": "data\n",
}
const ENV = {
  deep: "/",
  "deep/tool": "*#!/bin/sh\necho tool\n",
  "deep/text": "text\n",
  "deep/data": "data\n",
  empty: "/",
  lib: "/",
  "lib/sub": "/",
  "lib/sub/data": "data\n",
  "lib/libz.so.1": "z\n",
  "lib/libz.so": "z\n",
  bin: "/",
  "bin/tool": "*#!/bin/sh\necho tool\n",
  "bin/twin": "*#!/bin/sh\necho tool\n",
  "bin/a b'ü": "plain\n",
  "bin/\\x\nline": "odd\n",
  dangling: "-> nothing",
}
const ODD = {
  sub: "/",
  "sub/sub": "/",
  "sub/sub/up": "-> ../..",
  "sub/inner": "-> ../gone",
  self: "-> self",
  good: "text\n",
}

/** Every name below a directory, with the prefix. */
const below = (prefix: string, files: Record<string, string>): Record<string, string> =>
  Object.fromEntries([
    [prefix, "/"],
    ...Object.entries(files).map(([name, what]) => [`${prefix}/${name}`, what]),
  ])

const withFiles = (options: ProjectOptions): ProjectOptions => ({
  ...options,
  flake: { files: { "default.nix": DEFAULT_NIX }, chain: 4 },
})

// ── What lies where ───

const A = "/nix/store/00000000000000000000000000000000-a"
const B = "/nix/store/11111111111111111111111111111111-b"
const C = "/nix/store/22222222222222222222222222222222-c.txt"

/** What is at a path below /nix/store: "f" and "x" for files, "d" for a directory, "-> TEXT" for a link. */
type Store = Record<string, string>

function listingOf(store: Store): Listing {
  const entries = Object.entries(store).map(([path, what]): [string, Change] => {
    const name = bytes(path.replace("/nix/store/", ""))
    const type = what.startsWith("-> ")
      ? "link"
      : what === "d"
        ? "directory"
        : what === "o"
          ? "other"
          : "file"
    const target = type === "link" ? { target: bytes(what.slice(3)) } : {}
    return [
      name,
      {
        name,
        what: "created",
        type,
        mode: what === "x" ? 0o555 : 0o444,
        size: 1,
        modeOnly: false,
        ...target,
      },
    ]
  })
  return {
    asked: new Set([A, B, C].map((path) => path.slice("/nix/store/".length))),
    entries: new Map(entries),
  }
}

/** The names in the directory: with "/", with the text of a link, or with where the bytes come from. */
function laidOut(outputs: Output[], store: Store): { made: string[]; skipped: string[] } {
  const { laid, skipped, unlisted } = layOut(outputs, listingOf(store))
  expect(unlisted).toEqual([])
  const made = laid.map(({ name, type, source, target }) => {
    const short = source.replace(/^[01234]{32}-/, "")
    return type === "directory" ? `${name}/` : type === "link" ? `${name} -> ${target}` : `${name} = ${short}`
  })
  return { made: made.sort(), skipped: [...skipped].map(([name, why]) => `${name}: ${why}`).sort() }
}

describe("what lies where", () => {
  const cases: [what: string, store: Store, made: string[], skipped?: string[]][] = [
    ["a file keeps its name", { [A]: "f" }, ["a = a"]],
    ["a directory fills it", { [A]: "d", [`${A}/x`]: "f" }, ["/", "x = a/x"]],
    ["an output that is a link to a file", { [A]: `-> ${C}`, [C]: "f" }, ["a = c.txt"]],
    [
      "an output that is a link into a directory",
      { [A]: `-> ${B}/d`, [B]: "d", [`${B}/d`]: "d", [`${B}/d/x`]: "f" },
      ["/", "x = b/d/x"],
    ],
    [
      "through links on the way",
      {
        [A]: "d",
        [`${A}/x`]: `-> ${B}/l/f`,
        [B]: "d",
        [`${B}/l`]: "-> ./d/",
        [`${B}/d`]: "d",
        [`${B}/d/f`]: "f",
      },
      ["/", "x = b/d/f"],
    ],
    [
      "a relative link to another output",
      { [A]: "d", [`${A}/x`]: "-> ../11111111111111111111111111111111-b/f", [B]: "d", [`${B}/f`]: "f" },
      ["/", "x = b/f"],
    ],
    [
      "a directory twice, as it is reached twice",
      { [A]: "d", [`${A}/x`]: `-> ${B}`, [`${A}/y`]: `-> ${B}`, [B]: "d", [`${B}/f`]: "f" },
      ["/", "x/", "x/f = b/f", "y/", "y/f = b/f"],
    ],
    [
      "links that lead nowhere: the relative ones of the output stay",
      {
        [A]: "d",
        [`${A}/d`]: "d",
        [`${A}/d/a`]: "-> gone",
        [`${A}/d/b`]: "-> ../gone",
        [`${A}/d/c`]: "-> ../../gone",
        [`${A}/d/d`]: "-> x/../../../gone",
        [`${A}/d/e`]: `-> ${A}/gone`,
        [`${A}/d/f`]: "-> /etc/passwd",
        [`${A}/d/g`]: "-> /nix/store/.links/x",
        [`${A}/d/h`]: "-> ../../../../../../../nix/store/../../etc/passwd",
        [`${A}/d/i`]: "-> x/../y",
        [`${A}/d/j`]: "->  ",
      },
      ["/", "d/", "d/a -> gone", "d/b -> ../gone", "d/j ->  "],
      [
        "d/c: leads nowhere (../../gone)",
        "d/d: leads nowhere (x/../../../gone)",
        `d/e: leads nowhere (${A}/gone)`,
        "d/f: leads out of the store (/etc/passwd)",
        "d/g: leads nowhere (/nix/store/.links/x)",
        "d/h: leads out of the store (../../../../../../../nix/store/../../etc/passwd)",
        "d/i: leads nowhere (x/../y)",
      ],
    ],
    [
      "a path through a file leads nowhere",
      { [A]: "d", [`${A}/f`]: "f", [`${A}/l`]: `-> ${A}/f/x` },
      ["/", "f = a/f"],
      [`l: leads nowhere (${A}/f/x)`],
    ],
    [
      "circles: the ones that mean the same here stay",
      {
        [A]: "d",
        [`${A}/self`]: "-> self",
        [`${A}/one`]: `-> ${A}/two`,
        [`${A}/two`]: `-> ${A}/one`,
        [`${A}/here`]: "-> .",
        [`${A}/d`]: "d",
        [`${A}/d/up`]: "-> ..",
        [`${A}/d/top`]: `-> ${A}`,
        [`${A}/other`]: `-> ${B}/d`,
        [B]: "d",
        [`${B}/d`]: "d",
        [`${B}/d/up`]: "-> ..",
        [`${B}/d/f`]: "f",
      },
      ["/", "d/", "d/up -> ..", "here -> .", "other/", "other/f = b/d/f", "other/up/", "self -> self"],
      [
        `d/top: leads in a circle (${A})`,
        `one: leads in a circle (${A}/two)`,
        "other/up/d: leads in a circle",
        `two: leads in a circle (${A}/one)`,
      ],
    ],
    [
      "what is no file, and what nobody may name",
      {
        [A]: "d",
        [`${A}/fifo`]: "o",
        [`${A}/..`]: "d",
        [`${A}/../x`]: "f",
        [`${A}//x`]: "f",
        [`${A}/.GIT`]: "d",
        [`${A}/.GIT/config`]: "f",
        [`${A}/f`]: "f",
        [`${A}/f/x`]: "f",
      },
      ["/", "f = a/f"],
      [
        "..: is no path inside the tree",
        "//x: is no path inside the tree",
        ".GIT: lies in a .git",
        "fifo: is no file, directory or link",
      ],
    ],
  ]
  test.each(cases)("%s", (_, store, made, skipped = []) => {
    const found = laidOut([{ name: "result", target: A }], store)
    expect(found.made).toEqual([...made].sort())
    expect(found.skipped.filter((line) => !line.startsWith("//"))).toEqual(
      skipped.filter((line) => !line.startsWith("//")),
    )
  })

  test("several outputs lie below the names of their links, and links of one do not lead to the other", () => {
    const store = { [A]: "d", [`${A}/up`]: "-> ../c", [`${A}/x`]: `-> ${C}`, [C]: "f" }
    const outputs = [
      { name: "result", target: A },
      { name: "result-1", target: C },
    ]
    const { made, skipped } = laidOut(outputs, store)
    expect(made).toEqual(["result-1 = c.txt", "result/", "result/x = c.txt"])
    expect(skipped).toEqual(["result/up: leads nowhere (../c)"])
  })

  test("names the store paths that it has to know first", () => {
    const listing = { asked: new Set<string>(), entries: new Map() }
    expect(layOut([{ name: "result", target: A }], listing).unlisted).toEqual([A.slice("/nix/store/".length)])
  })

  test("links that branch at each step come to an end", () => {
    const store: Store = { [A]: "d" }
    for (let n = 0; n < 40; n++) {
      store[`${A}/${n}`] = "d"
      for (const branch of ["l", "r"]) store[`${A}/${n}/${branch}`] = `-> ${A}/${n + 1}`
    }
    store[`${A}/40`] = "f"
    store[B] = `-> ${A}/0`
    expect(() => layOut([{ name: "result", target: B }], listingOf(store))).toThrow("more than")
  })
})

// ── Between machines ───

const available = await nixAvailable("2.34")
const machines: [what: string, options: ProjectOptions, needs: true | string][] = [
  ["no Nix here", { client: { nix: "none" } }, true],
  ["no Nix here, only BusyBox there", { client: { nix: "none" }, host: { busybox: true } }, true],
  ["no Nix here, BSD's tools there", { client: { nix: "none" }, host: { bsd: true } }, true],
  ["Nix here, a newer one there", { host: { nix: "2.34" } }, available],
]

describe.each(machines)("--materialize: %s", (_, options, needs) => {
  let p: Project
  beforeAll(async () => {
    if (needs !== true) return
    p = await project(withFiles(options))
    await p.sh(`mkdir -m 755 /root/there`)
  })
  afterAll(() => p?.[Symbol.asyncDispose]())

  const cases: [words: string[], made: Record<string, string>, left?: string[]][] = [
    [["nix-build", "-A", "text"], TEXT],
    [["nix-build", "-A", "text", "--no-out-link"], TEXT],
    [["nix-build", "-A", "link", "-o", "x"], { link: "text\n" }],
    [["nix-build", "-A", "lib"], LIB],
    [["nix-build", "-A", "env"], ENV],
    [
      ["nix-build", "-A", "odd"],
      ODD,
      [
        ".git: it lies in a .git",
        "gone: it leads nowhere (/nix/store/00000000000000000000000000000000-gone)",
        "passwd: it leads out of the store (/etc/passwd)",
        "sub/again: it leads in a circle (/nix/store/HASH-odd/sub)",
        "sub/outer: it leads out of the store (../../../gone)",
        "sub/passwd: it leads out of the store (../../../etc/passwd)",
      ],
    ],
    [
      ["nix-build", "-A", "lib", "-A", "text", "--no-out-link"],
      { ...below("result", LIB), "result-2": "text\n" },
    ],
    [["nix", "build", ".#hello"], { hello: "hello\n" }],
    [["nix", "build", ".#hello"], { hello: "hello\n" }], // the same again: the link is there already
    [["nix", "build", ".#hello", "--no-link"], { hello: "hello\n" }],
    [["nix", "build", ".#chain"], { next: "/", "next/next": "/", "next/next/next": "end\n" }],
    [["nix-build", "-A", "lib", "-A", "text", "-o", "../o"], { ...below("o", LIB), "o-2": "text\n" }],
  ]
  const isFirst = options === machines[0]![1]
  const common = cases.filter(([words]) => ["env", "odd", ".#hello"].some((word) => words.includes(word)))
  test.each(isFirst ? cases : common)("%j", async (words, made, left = []) => {
    if (needs !== true) return console.log(`skipped: ${needs}`)
    await p.client.sh("rm -rf /root/out /root/p/result*")
    const { code, stderr } = await p.edict(["--materialize", "../out", "h", ...words])
    expect({ code, stderr: code === 0 ? "" : stderr }).toEqual({ code: 0, stderr: "" })
    expect(contents(p.client.outside("/root/out"))).toEqual(made)
    const said = stderr.split("\n").filter((line) => line.startsWith("edict:"))
    const files = Object.values(made).filter((what) => what !== "/" && !what.startsWith("-> ")).length
    expect(said.pop()).toMatch(
      new RegExp(`^edict: \\.\\./out holds ${files} files? \\(1 KiB\\) of (/nix/store/\\S+|\\w+, [\\w-]+)$`),
    )
    const known = said.map((line) =>
      line.replace("edict: left out: ", "").replace(/[0-9a-z]{32}-odd/, "HASH-odd"),
    )
    expect(known).toEqual(left)
    // No link and no store path came, nothing is left over, and git sees nothing new.
    const { stdout } = await p.client.sh(
      `cd /root && ls -A | grep stage; find . -path ./out -prune -o -lname '/nix/store/*' -print; ls -d /nix/store/*-env; git -C p status --short`,
    )
    expect(stdout).toBe("")
  })

  test("modes are those of new files here, executable or not", async () => {
    if (needs !== true) return
    const { code } = await p.sh("umask 027; edict --materialize ../modes h nix-build -A env")
    expect(code).toBe(0)
    const { stdout } = await p.client.sh(
      "cd /root/modes && stat -c '%a %h %U %n' . bin bin/tool bin/twin deep/tool lib/libz.so empty; touch -d '1 hour ago' /tmp/old; find . -type f ! -newer /tmp/old",
    )
    expect(stdout.trimEnd().split("\n")).toEqual([
      "750 2 root .".replace(" 2 ", ` ${lstatSync(p.client.outside("/root/modes")).nlink} `),
      `750 ${lstatSync(p.client.outside("/root/modes/bin")).nlink} root bin`,
      "750 1 root bin/tool",
      "750 1 root bin/twin",
      "750 1 root deep/tool",
      "640 1 root lib/libz.so",
      `750 ${lstatSync(p.client.outside("/root/modes/empty")).nlink} root empty`,
    ])
    expect((await p.client.sh("echo more >>/root/modes/lib/libz.so && rm -r /root/modes")).code).toBe(0)
  })

  test("over there nothing stays that was made for it", async () => {
    if (needs !== true) return
    await p.client.sh("rm -rf /root/out")
    await p.edict(["--materialize", "../out", "h", "nix", "build", ".#hello", "--no-link"])
    for (let i = 0; i < 100 && (await runs(p.host)) !== ""; i++) await Bun.sleep(100)
    expect(await runs(p.host)).toBe("")
  })
})

const runs = async (host: Host): Promise<string> =>
  (await host.sh("ls /root/.cache/edict/run /tmp")).stdout.replace(/^\/.*:\n|\n$/gm, "").trim()

describe("--materialize", () => {
  let p: Project
  beforeAll(async () => {
    p = await project(withFiles({ client: { nix: "none" }, host: { hide: ["nothing"] } }))
  })
  afterAll(() => p[Symbol.asyncDispose]())

  test("an empty directory is filled and stays the one it was; missing ones above are made", async () => {
    const script = `mkdir /root/empty && cd /root/empty && ls -di . && edict --materialize . h nix build ../p#hello -o ../r && ls -di . && ls -A`
    const { stdout } = await p.sh(script)
    const [before, after, ...names] = stdout.trimEnd().split("\n")
    expect(before).toBe(after!)
    expect(names).toEqual(["hello"])
    expect((await p.edict(["--materialize=/root/a/b/c", "h", "nix", "build", ".#hello"])).code).toBe(0)
    expect((await p.client.sh("find /root/a -printf '%M %P\n'")).stdout).toBe(
      "drwxr-xr-x \ndrwxr-xr-x b\ndrwxr-xr-x b/c\n-rw-r--r-- b/c/hello\n",
    )
  })

  const refusals: [what: string, setup: string, name: string, says: RegExp][] = [
    [
      "a directory with something in it",
      "mkdir d; touch d/.x",
      "d/",
      /d\/ is there already, .*; try: mv d d\.old /,
    ],
    ["the current directory", "touch x", ".", /\. is there already, .*; try: --materialize out /],
    ["a file", "touch f", "f", /f is there already/],
    ["a link to nowhere", "ln -s gone l", "l", /l is there already/],
    ["below a file", "touch g", "g/h", /g\/h cannot be made: nothing can be written to \S+\/g;/],
  ]
  test.each(refusals)("%s is refused before anything runs", async (_, setup, name, says) => {
    const directory = (await p.client.sh(`mktemp -d /root/XXXXXX; `)).stdout.trim()
    await p.client.sh(setup, { cwd: directory })
    const before = p.host.log()
    for (const options of [[], ["-n"]]) {
      const argv = [...options, "--materialize", name, "h", "nix", "build", "../p#hello"]
      const { code, stderr } = await p.client.run([EDICT, ...argv], { cwd: directory })
      expect({ code, stderr }).toMatchObject({ code: 254 })
      expect(stderr).toMatch(says)
    }
    expect(p.host.log()).toBe(before)
  })

  test("a failed command: its exit code, and no directory", async () => {
    const { code, stderr } = await p.edict(["--materialize", "../failed", "h", "nix", "build", ".#fails"])
    expect(code).toBe(1)
    expect(stderr).not.toContain("edict:")
    expect((await p.client.sh("ls -d /root/failed")).stdout).toBe("")
  })

  test("no result: an error that names one", async () => {
    const { code, stdout, stderr } = await p.edict([
      "--materialize",
      "../none",
      "h",
      "nix",
      "eval",
      ".#lib.answer",
    ])
    expect({ code, stdout }).toEqual({ code: 254, stdout: "42\n" })
    expect(stderr.trimEnd().split("\n").at(-1)).toBe(
      "edict: nothing to put into ../none: the command made no result link; try: edict --materialize ../none h nix build …",
    )
  })

  test("what the command changed comes home all the same; --report tells of both", async () => {
    const argv = ["--materialize", "../report", "--report", "/root/report.json", "--sync", "h"]
    const script = "echo made >made && nix-build -A odd"
    const { code } = await p.edict([...argv, "nix", "shell", ".#status", "-c", "sh", "-c", script])
    expect(code).toBe(0)
    expect(contents(p.client.outside("/root/report"))).toEqual(ODD)
    const report: unknown = JSON.parse(readFileSync(p.client.outside("/root/report.json"), "utf8"))
    expect(report).toMatchObject({
      changed: ["made"],
      resultLinks: [],
      materialized: {
        directory: "/root/report",
        files: 1,
        bytes: 5,
        skipped: { passwd: "leads out of the store (/etc/passwd)" },
      },
    })
    await p.sh("rm made")
  })

  test("--dry-run says how", async () => {
    const { stdout } = await p.edict(["-n", "--materialize", "../x y", "h", "nix", "build", "--no-link"])
    expect(stdout).toContain(`nix build --out-link`)
    expect(stdout).toContain("/run/RUN/out/result")
    expect(stdout).toMatch(
      /^ssh -- h 'tar -cf - -C \/nix\/store FILES…' \| tar -xf - -C STAGING {3}# then into \/root\/x y$/m,
    )
    expect(stdout).not.toContain("--import")
    const after = await p.edict([
      "-n",
      "--materialize",
      "x",
      "h",
      "nix",
      "build",
      "nixpkgs#x",
      "--",
      "--no-link",
    ])
    expect(after.stdout).not.toContain("--out-link")
  })

  test("several hosts: a directory for each", async () => {
    await p.client.sh("cat >>.ssh/config", {
      stdin: `Host again\n  HostName 127.0.0.1\n  Port ${p.host.port}\n  User nobody\n  UserKnownHostsFile /root/.ssh/known_hosts\n`,
    })
    const { code, stderr } = await p.edict(["--materialize", "../many", "h,again", "nix-build", "-A", "text"])
    expect(code).toBe(255) // the other one lets nobody in
    expect(stderr).toMatch(/^h +\S* *edict: \.\.\/many\/h holds 1 file /m)
    expect(contents(p.client.outside("/root/many"))).toEqual(below("h", TEXT))
  })

  test("Ctrl-C while files come: nothing is left", async () => {
    await install(
      p.host,
      "tar",
      `case "$*" in *-cf*) "$real" "$@"; sleep 300 ;; *) exec "$real" "$@" ;; esac`,
    )
    const running = p.spawn(["--materialize", "../cut", "h", "nix-build", "-A", "env"])
    const stages = () => readdirSync(p.client.outside("/root")).filter((name) => name.includes("stage"))
    for (let i = 0; i < 600 && stages().length === 0; i++) await Bun.sleep(50)
    expect(stages()).toHaveLength(1)
    await running.kill("SIGINT")
    expect(await running.result).toMatchObject({ code: 130 })
    expect(stages()).toEqual([])
    expect((await p.client.sh("ls -d /root/cut")).stdout).toBe("")
  })
})

// ── All the rest, without Nix here ───

describe("without Nix here", () => {
  let p: Project
  beforeAll(async () => {
    const files = { "default.nix": DEFAULT_NIX }
    p = await project({ client: { nix: "none" }, flake: { files, input: "path:/srv/dep" } })
    await p.host.sh("mkdir -p /srv/dep")
    writeInput(p.host.outside("/srv/dep"), "1")
  })
  afterAll(() => p[Symbol.asyncDispose]())

  test("there is none", async () => {
    expect((await p.client.sh("ls -d /usr/bin/nix* /nix/*")).stdout).toBe("")
  })

  test("flake update: flake.lock comes home", async () => {
    const { code, stderr } = await p.edict(["h", "nix", "flake", "update"])
    expect(code).toBe(0)
    expect(stderr).toContain("edict: 1 file changed here: flake.lock")
    expect((await p.sh("git add flake.lock && git commit -qm lock")).code).toBe(0)
    writeInput(p.host.outside("/srv/dep"), "2")
    expect((await p.edict(["h", "nix", "flake", "update"])).code).toBe(0)
    expect((await p.sh("git diff --stat")).stdout).toContain("flake.lock")
  })

  test("build: the result stays there, and edict says how its files come home", async () => {
    const { code, stdout, stderr } = await p.edict(["h", "nix", "build", ".#hello", ".#multi"])
    expect({ code, stdout }).toEqual({ code: 0, stdout: "" })
    const said = stderr.split("\n").filter((line) => line.startsWith("edict: "))
    expect([said[0], ...said.slice(1).sort()]).toEqual([
      "edict: the files of a result come without Nix, too: edict --materialize DIR h …",
      expect.stringMatching(/^edict: no nix here: result is \/nix\/store\/\S+ on h$/),
      expect.stringMatching(/^edict: no nix here: result-1 is \/nix\/store\/\S+ on h$/),
    ])
    for (const line of said.slice(1))
      expect((await p.host.run(["cat", / is (\S+) on/.exec(line)![1]!])).code).toBe(0)
    expect((await p.sh("ls -d result*")).stdout).toBe("")
  })

  const commands: [words: string[], code: number, stdout: string][] = [
    [["nix", "run", ".#cat"], 0, "a\0b"],
    [["nix", "run", ".#exit7"], 7, ""],
    [["nix", "flake", "check"], 0, ""],
    [["nix", "eval", ".#lib.answer"], 0, "42\n"],
    [["nix", "eval", "--expr", "1"], 0, "1\n"],
    [["nix", "develop", "-c", "printenv", "IN_DEV_SHELL"], 0, "yes\n"],
    [["nix-instantiate", "--eval", "-E", "1 + 1"], 0, "2\n"],
    [["nix-shell", "-E", "(import ./default.nix).text", "--run", "echo in"], 0, "in\n"],
    [["nix", "build", ".#fails"], 1, ""],
    [[".#args", "--", "x"], 0, "78\n"],
  ]
  test.each(commands)("%j", async (words, code, stdout) => {
    const result = await p.edict(["h", ...words], { stdin: "a\0b" })
    expect({ code: result.code, stdout: result.stdout }).toEqual({ code, stdout })
    expect(result.stderr).not.toContain("edict:")
  })

  test("what the command changed comes home, and the next run knows of it", async () => {
    const { code, stderr } = await p.edict(["h", "nix", "run", ".#bump"])
    expect(code).toBe(0)
    expect(stderr).toContain("edict: 4 files changed here: ")
    expect(readFileSync(p.file("version.txt"), "utf8")).toBe("2\n")
    expect(readFileSync(p.file("new/file.txt"), "utf8")).toBe("new\n")
    expect((await p.edict(["h", "nix", "run", ".#bump"])).code).toBe(0)
    expect(readFileSync(p.file("version.txt"), "utf8")).toBe("3\n")
    expect((await p.edict(["h", "nix", "fmt"])).code).toBe(0)
    expect(readFileSync(p.file("untidy.txt"), "utf8")).toBe("blanks at the end\n")
  })
})

// ── A host that lies ───

/** Puts a script in the place of a program over there; $real is the program itself. */
async function install(host: Host, name: string, text: string): Promise<void> {
  const script = `#!/bin/sh\nreal=/run/lab/usr/bin/${name}\n${text}\n`
  const made = await host.sh(`cd /usr/local/bin && rm -f ${name} && cat >${name} && chmod +x ${name}`, {
    stdin: script,
  })
  expect(made).toMatchObject({ code: 0, stderr: "" })
}

describe("a host that lies", () => {
  let p: Project
  let store: string
  beforeAll(async () => {
    p = await project(withFiles({ client: { nix: "none" }, host: { hide: ["nothing"] } }))
    await p.client.sh("mkdir /root/victim && echo keep >/root/victim/keep")
    const { stdout } = await p.edict(["h", "nix-build", "-A", "lib"])
    store = stdout.trim().replace("/nix/store/", "")
    await install(
      p.host,
      "find",
      `case "$*" in '${store}'*) cat /root/listing ;; *) exec "$real" "$@" ;; esac`,
    )
    await install(
      p.host,
      "tar",
      `case "$*" in *-cf*) ;; *) exec "$real" "$@" ;; esac
cat >/dev/null
cd /root/evil && "$real" -cf - --absolute-names --no-recursion $(cat /root/members)
if [ -e /root/endless ]; then exec cat /dev/zero; fi`,
    )
  })
  afterAll(() => p[Symbol.asyncDispose]())

  type Lie = {
    what: string
    /** What find says of the result: type, size, name below the store path, text of a link. */
    listing: [type: string, size: number, name: string, text?: string][]
    /** Makes the members of the archive, in a directory for them. */
    evil: string
    members: string[]
    made?: Record<string, string>
    says?: RegExp
    endless?: true
  }
  const lies: Lie[] = [
    {
      what: "the truth, for comparison",
      listing: [
        ["d755", 0, ""],
        ["f755", 4, "/good"],
      ],
      evil: "echo yes >STORE/good",
      members: ["STORE/good"],
      made: { good: "*yes\n" },
    },
    {
      what: "names that lead elsewhere are left out",
      listing: [
        ["d755", 0, ""],
        ["f644", 4, "/good"],
        ["f644", 4, "/../x"],
        ["f644", 4, "/.git/config"],
        ["d755", 0, "/.."],
        ["d755", 0, "/.git"],
        ["l777", 0, "/l", "/root/victim"],
        ["l777", 0, "/m", "../victim"],
      ],
      evil: "echo yes >STORE/good",
      members: ["STORE/good"],
      made: { good: "yes\n" },
    },
    {
      what: "a name outside of what was asked for",
      listing: [
        ["d755", 0, ""],
        ["f644", 4, "x/good"],
      ],
      evil: ":",
      members: [],
      says: /^edict: h named \S+ as part of the result/m,
    },
    {
      what: "nothing at all",
      listing: [],
      evil: ":",
      members: [],
      says: /^edict: h has no file of \/nix\/store\//m,
    },
    {
      what: "a member with .. and one with an absolute name",
      listing: [
        ["d755", 0, ""],
        ["f644", 4, "/good"],
      ],
      evil: "echo yes >STORE/good; echo bad >../x; mkdir -p /root/victim; echo bad >/root/victim/keep",
      members: ["STORE/good", "STORE/../../x", "/root/victim/keep"],
      says: /^edict: retrieval of files of the result failed/m,
    },
    {
      what: "a link, then a file through it",
      listing: [
        ["d755", 0, ""],
        ["f644", 4, "/l/keep"],
        ["d755", 0, "/l"],
      ],
      evil: "ln -s /root/victim STORE/l; mkdir -p /root/victim; echo bad >/root/victim/keep",
      members: ["STORE/l", "STORE/l/keep"],
      says: /^edict: h did not send \S+ as it had named it|retrieval of files/m,
    },
    {
      what: "a link in the place of a file",
      listing: [
        ["d755", 0, ""],
        ["f644", 4, "/l"],
      ],
      evil: "ln -s /root/victim/keep STORE/l",
      members: ["STORE/l"],
      says: /^edict: h did not send \S+-lib\/l as it had named it/m,
    },
    {
      what: "a fifo",
      listing: [
        ["d755", 0, ""],
        ["f644", 0, "/l"],
      ],
      evil: "mkfifo STORE/l",
      members: ["STORE/l"],
      says: /^edict: h did not send \S+-lib\/l as it had named it/m,
    },
    {
      what: "another size than it said",
      listing: [
        ["d755", 0, ""],
        ["f644", 3, "/good"],
      ],
      evil: "echo yes >STORE/good",
      members: ["STORE/good"],
      says: /^edict: h did not send \S+-lib\/good as it had named it/m,
    },
    {
      what: "setuid, and members that nobody asked for",
      listing: [
        ["d755", 0, ""],
        ["f6755", 4, "/good"],
      ],
      evil: "echo yes >STORE/good; chmod 6777 STORE/good; echo more >STORE/more",
      members: ["STORE/good", "STORE/more"],
      made: { good: "*yes\n" },
    },
    {
      what: "an endless stream",
      listing: [
        ["d755", 0, ""],
        ["f644", 4, "/good"],
      ],
      evil: "echo yes >STORE/good; truncate -s 8G STORE/big; true >/root/endless",
      members: ["STORE/good", "STORE/big"],
      says: /^edict: the files of the result were cut off, or more than h had announced/m,
    },
    {
      what: "more than there is space for",
      listing: [
        ["d755", 0, ""],
        ["f644", 10 ** 14, "/good"],
      ],
      evil: ":",
      members: [],
      says: /^edict: the files of the result are \d+ MiB; there is no space left for them here/m,
    },
  ]

  test.each(lies)("$what", async ({ listing, evil, members, made, says }) => {
    const records = listing.map(([type, size, name, link]) => {
      const path = store + name
      return `+${type}//${size}///${path}\0${link === undefined ? "" : `t${link}\0n${path}\0`}`
    })
    await p.client.sh("rm -rf /root/out")
    await p.host.sh("cat >/root/listing", { stdin: records.join("") })
    await p.host.sh("cat >/root/members", {
      stdin: members
        .map((name) => `./${name}`.replace("./STORE", `./${store}`).replace(/^\.\/(?=\/)/, ""))
        .join("\n"),
    })
    const { stderr: trouble } = await p.host.sh(
      `rm -rf evil endless; mkdir -p evil/${store} && cd evil && ${evil.replaceAll("STORE", store)}`,
    )
    expect(trouble).toBe("")
    const before = await seen()
    const { code, stderr } = await p.edict(["--materialize", "../out", "h", "nix-build", "-A", "lib"])
    expect({ code, stderr }).toMatchObject({ code: made ? 0 : 254 })
    if (says) expect(stderr).toMatch(says)
    if (made) {
      expect(contents(p.client.outside("/root/out"))).toEqual(made)
      expect((await p.client.sh("find /root/out -perm /7000")).stdout).toBe("")
    } else expect((await p.client.sh("ls -d /root/out")).stdout).toBe("")
    await p.client.sh("rm -rf /root/out")
    expect(await seen()).toBe(before)
  })

  /** Everything here but what edict itself notes. */
  const seen = async (): Promise<string> => {
    const script =
      "find . \\( -path ./.cache -o -path ./.local \\) -prune -o ! -path . -printf '%M %s %p %l\\n' | grep -v /index; cat victim/keep"
    return (await p.client.sh(script)).stdout
  }
})

describe("moveInto", () => {
  let place = ""
  beforeEach(() => void (place = mkdtempSync(join(tmpdir(), "edict-move-"))))
  afterEach(() => rmSync(place, { recursive: true }))

  const sh = (script: string): string => {
    const { stdout, stderr } = Bun.spawnSync(["sh", "-euc", script], { cwd: place })
    return `${stdout}${stderr}`
  }
  const move = () => moveInto(bytes(join(place, "from")), bytes(join(place, "to")))

  test("files, links and directories", () => {
    sh("mkdir -p from/d/e to; echo 1 >from/f; echo 2 >from/d/e/g; ln -s f from/l; ln -s nowhere from/gone")
    move()
    expect(sh("cat to/f to/d/e/g to/l; readlink to/gone; ls from/d 2>/dev/null || :")).toBe(
      "1\n2\n1\nnowhere\n",
    )
  })

  test.each([
    ["a file over a file", "echo new >from/x; echo mine >to/x", "cat to/x"],
    ["a link over a file", "ln -s new from/x; echo mine >to/x", "cat to/x"],
    ["a file over a link", "echo new >from/x; echo mine >kept; ln -s ../kept to/x", "cat to/x kept | uniq"],
    ["a file over a directory", "echo new >from/x; mkdir to/x; echo mine >to/x/y", "cat to/x/y"],
    ["a directory over a file", "mkdir from/x; echo mine >to/x", "cat to/x"],
    ["a directory over a full one", "mkdir from/x to/x; echo new >from/x/y; echo mine >to/x/y", "cat to/x/y"],
  ])("%s that appeared meanwhile: refused", (_, setup, look) => {
    sh(`mkdir from to; ${setup}`)
    expect(move).toThrow(/EEXIST|ENOTDIR|ENOTEMPTY/)
    expect(sh(look)).toBe("mine\n")
  })
})
