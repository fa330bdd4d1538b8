// Result links and what they lead to: as if the build had been here.
import { afterAll, beforeAll, describe, expect, test } from "bun:test"
import {
  existsSync,
  lstatSync,
  mkdirSync,
  readFileSync,
  readlinkSync,
  symlinkSync,
  writeFileSync,
} from "node:fs"
import { join } from "node:path"
import { GIT_INIT, writeFiles, writeFlake, type FlakeOptions } from "./lab/flake"
import { nixAvailable, startClient, type Client, type NixVersion } from "./lab/lab"
import { EDICT, project, type Project } from "./support"

/** Attributes for nix-build: one output, several outputs, one that fails. */
const DEFAULT_NIX = `let
  build = name: outputs: script: derivation {
    inherit name outputs;
    system = builtins.currentSystem;
    builder = "/bin/sh";
    args = [ "-euc" script ];
    PATH = "/bin:/usr/bin";
  };
in {
  a = build "a" [ "out" ] "echo a >$out";
  b = build "b" [ "out" ] "echo b >$out";
  m = build "m" [ "out" "dev" "man" ] "echo out >$out; echo dev >$dev; echo man >$man";
  bad = build "bad" [ "out" ] "exit 1";
}
`
const FLAKE: FlakeOptions = { files: { "default.nix": DEFAULT_NIX, ".gitignore": "/ignored\n" } }
const FEATURES = { NIX_CONFIG: "extra-experimental-features = nix-command flakes" }

/** Every link below the home directory that is not the lab's or git's: "PATH -> TEXT", sorted. */
async function links(machine: Client): Promise<string[]> {
  const hidden = "-path '*/.git' -prune -o -path '/root/.*' -prune"
  const { stdout } = await machine.sh(`find /root ${hidden} -o -type l -printf '%p -> %l\\n' | sort`)
  return stdout.split("\n").slice(0, -1)
}

/** Removes all that a case can make. */
const tidy = (machine: Client) =>
  machine.sh(
    `find . -name .git -prune -o -type l -exec rm -f {} +
    rm -rf d /root/abs /root/out* /root/prof; mkdir d /root/prof`,
    { cwd: "/root/p" },
  )

/** Which of the targets, or of what they refer to, are not valid on the machine. */
async function invalid(machine: Client, targets: readonly string[]): Promise<string> {
  if (targets.length === 0) return ""
  const words = targets.join(" ")
  const { stdout, stderr } = await machine.sh(
    `nix-store --check-validity --print-invalid ${words}; nix-store --check-validity --print-invalid $(nix-store -qR ${words})`,
  )
  return stdout + stderr
}

const storePaths = (found: readonly string[]): string[] =>
  found.flatMap((line) => /-> (\/nix\/store\/.*)$/.exec(line)?.[1] ?? [])

type Build = [words: string[], linksMade: number]

const builds: Build[] = [
  [["nix", "build", ".#hello"], 1],
  [["nix", "build"], 1],
  [["nix", "build", ".#hello", ".#chain", ".#many"], 3],
  [["nix", "build", ".#hello", "-o", "out", ".#chain"], 2],
  [["nix", "build", ".#hello", "-o", "d/e/out"], 1],
  [["nix", "build", ".#hello", "--out-link", "/root/abs/out"], 1],
  [["nix", "build", ".#hello", ".#chain", "-o", "../out"], 2],
  [["nix", "build", ".#hello", "-o", "a b'ü$(x)"], 1],
  [["nix", "build", ".#hello", "--no-link"], 0],
  [["nix", "build", ".#hello", "-o", ""], 0],
  [["nix", "build", ".#hello", "-o", "x", "--no-link"], 0],
  [["nix", "build", ".#hello", "--dry-run"], 0],
  [["nix", "build", ".#hello", "--json"], 1],
  [["nix", "build", ".#hello", "--profile", "./prof"], 3],
  [["nix", "build", ".#hello", "--profile", "/root/prof/p", "--no-link"], 2],
  [["nix", "develop", "--profile", "d/shell", "-c", "true"], 2],
  [["nix-build", "-A", "a"], 1],
  [["nix-build", "-A", "a", "-A", "b", "-A", "m.man"], 3],
  [["nix-build", "-A", "m.all"], 3],
  [["nix-build", "-A", "a", "-o", "d/x"], 1],
  [["nix-build", "-A", "a", "--no-out-link"], 0],
]
const outputs: Build[] = [
  [["nix", "build", ".#multi^dev,man"], 2],
  [["nix", "build", ".#multi^*"], 3],
  [["nix", "build", ".#hello", ".#multi^*", ".#chain", "-o", "d/x"], 5],
  [["nix", "build", ".#multi^dev,out", ".#multi^man", "--print-out-paths"], 3],
]

const isCommon = ([words]: Build) => ["--profile", "nix-build", ".#many"].some((word) => words.includes(word))

const versions: [NixVersion, Build[]][] = [
  ["2.8", [...builds, [["nix", "build", ".#multi"], 1]]],
  ["2.26", [...outputs, ...builds.filter(isCommon)]],
  ["2.34", [...outputs, ...builds.filter(isCommon)]],
]

for (const [nix, table] of versions) {
  const available = await nixAvailable(nix)
  describe.skipIf(available !== true)(`Nix ${nix}: the links are those of a build here`, () => {
    let p: Project, local: Client

    beforeAll(async () => {
      ;[p, local] = await Promise.all([
        project({ host: { nix }, client: { nix }, flake: FLAKE }),
        startClient({ hosts: [], nix }),
      ])
      await local.sh("mkdir /root/p")
      writeFlake(local.outside("/root/p"), FLAKE)
      await local.sh(GIT_INIT, { cwd: "/root/p" })
    })

    afterAll(async () => {
      await Promise.all([p[Symbol.asyncDispose](), local.stop()])
    })

    test.each(table)("%j", async (words, count) => {
      await Promise.all([tidy(p.client), tidy(local)])
      const [there, here] = await Promise.all([
        p.edict(["h", ...words]),
        local.run(words, { cwd: "/root/p", env: FEATURES }),
      ])
      expect({ code: here.code, stderr: here.code === 0 ? "" : here.stderr }).toEqual({ code: 0, stderr: "" })
      expect({ code: there.code, stderr: there.code === 0 ? "" : there.stderr }).toEqual({
        code: 0,
        stderr: "",
      })
      expect(there.stdout).toBe(here.stdout)
      const [made, expected] = await Promise.all([links(p.client), links(local)])
      expect(made).toEqual(expected)
      expect(expected).toHaveLength(count)

      const targets = storePaths(made)
      expect(await invalid(p.client, targets)).toBe("")
      if (targets.length === 0) return
      const { stdout: roots } = await p.client.sh("nix-store --gc --print-roots")
      for (const line of made.filter((item) => item.includes("-> /nix/store/")))
        expect(roots.replaceAll('"', "")).toContain(line)
      expect((await p.client.sh("nix-store --gc")).code).toBe(0)
      expect(await invalid(p.client, targets)).toBe("")
    })
  })
}

describe("result links", () => {
  let p: Project

  beforeAll(async () => {
    p = await project({ flake: { ...FLAKE, many: 500, chain: 20 } })
  })

  afterAll(() => p[Symbol.asyncDispose]())

  const target = (link: string): string => readlinkSync(p.client.outside(link))

  test("live as long as the link does", async () => {
    expect(await p.edict(["h", "nix", "build", ".#chain"])).toMatchObject({ code: 0 })
    const path = target("/root/p/result")
    await p.sh("nix-store --gc")
    expect(await invalid(p.client, [path])).toBe("")
    await p.sh("rm result; nix-store --gc")
    expect(existsSync(p.client.outside(path))).toBeFalse()
  })

  test("the closing line names link and target; -q says nothing", async () => {
    const { code, stdout, stderr } = await p.edict(["h", "nix", "build", ".#hello", "-o", "d/x"])
    expect({ code, stdout }).toEqual({ code: 0, stdout: "" })
    expect(stderr.trimEnd().split("\n").at(-1)).toBe(`edict: d/x -> ${target("/root/p/d/x")}`)
    const quiet = await p.edict(["-q", "h", "nix", "build", ".#hello"])
    expect(quiet).toMatchObject({ code: 0, stdout: "", stderr: "" })
    expect(target("/root/p/result")).toBe(target("/root/p/d/x"))
  })

  test("a closure of 500 paths comes home whole, and once", async () => {
    const first = await p.edict(["-v", "h", "nix", "build", ".#many"])
    expect(first.code).toBe(0)
    const { stdout } = await p.sh("nix-store -qR ./result | wc -l")
    expect(Number(stdout)).toBe(501)
    expect(await invalid(p.client, [target("/root/p/result")])).toBe("")
    expect(first.stderr).toContain("nix-store --import")

    const again = await p.edict(["-v", "h", "nix", "build", ".#many"])
    expect(again.code).toBe(0)
    expect(again.stderr).not.toContain("nix-store --import")
    expect(again.stderr).toContain(`edict: result -> ${target("/root/p/result")}`)
  })

  test("a failed build makes no link and leaves the old one", async () => {
    await p.edict(["h", "nix", "build", ".#hello"])
    const old = target("/root/p/result")
    const failed = await p.edict(["h", "nix", "build", ".#fails"])
    expect(failed.code).toBe(1)
    expect(failed.stderr).toContain("failing on purpose")
    expect(target("/root/p/result")).toBe(old)
    await p.sh("rm -f result*")
    expect((await p.edict(["h", "nix", "build", ".#fails"])).code).toBe(1)
    expect((await p.edict(["h", "nix-build", "-A", "bad"])).code).toBe(100)
    expect(await p.sh("ls -d result*").then(({ stdout }) => stdout)).toBe("")
  })

  test("a link that was removed here stays removed when another one is made", async () => {
    await p.edict(["h", "nix", "build", ".#hello", ".#chain"])
    await p.sh("rm result-1")
    await p.edict(["h", "nix", "build", ".#hello"])
    expect((await p.sh("ls -d result*")).stdout).toBe("result\n")
  })

  test("one that led elsewhere leads to the new result", async () => {
    await p.edict(["h", "nix", "build", ".#hello"])
    const old = target("/root/p/result")
    await p.edict(["h", "nix", "build", ".#chain"])
    expect(target("/root/p/result")).not.toBe(old)
    expect(await invalid(p.client, [target("/root/p/result")])).toBe("")
  })

  /** What a user may have under the name of a link, made at a path outside, and how to see that it is still there. */
  const own: [what: string, make: (path: string) => void, look: (path: string) => string][] = [
    ["file", (path) => writeFileSync(path, "mine\n"), (path) => readFileSync(path, "utf8")],
    [
      "directory",
      (path) => (mkdirSync(path), writeFileSync(join(path, "f"), "mine\n")),
      (path) => readFileSync(join(path, "f"), "utf8"),
    ],
    ["link to a file of yours", (path) => symlinkSync("hello.txt", path), (path) => readlinkSync(path)],
    ["link to nowhere", (path) => symlinkSync("/nowhere/at/all", path), (path) => readlinkSync(path)],
  ]

  test.each(own)("a %s under that name is never touched", async (_, make, look) => {
    await p.sh("rm -rf ignored result; nix-store --gc")
    // Git ignores it, so it is not over there, where the build succeeds.
    const path = p.file("ignored")
    make(path)
    const before = [look(path), lstatSync(path, { bigint: true }).ctimeNs]
    const { code, stderr } = await p.edict(["h", "nix", "build", ".#hello", "-o", "ignored"])
    expect([look(path), lstatSync(path, { bigint: true }).ctimeNs]).toEqual(before)
    expect(code).toBe(254)
    const lines = stderr.split("\n").filter((line) => line.startsWith("edict:"))
    expect(lines).toHaveLength(1)
    expect(lines[0]).toMatch(
      /ignored is no link into the store, so it stays; the result is \/nix\/store\/\S+; try: mv /,
    )

    // What it says to type works: the result is here.
    const hint = /; try: (.*)$/.exec(lines[0] ?? "")?.[1] ?? "false"
    expect(await p.sh(hint)).toMatchObject({ code: 0 })
    expect(readlinkSync(path)).toStartWith("/nix/store/")
    expect(await invalid(p.client, [readlinkSync(path)])).toBe("")
    await p.sh("rm -rf ignored ignored.mine")
  })

  test("the same where it is in the way over there, too: Nix's own words and exit code", async () => {
    await p.sh("rm -rf result; echo mine >result")
    const { code, stderr } = await p.edict(["h", "nix", "build", ".#hello"])
    expect(code).toBe(1)
    expect(stderr).toContain("cannot create symlink")
    expect((await p.sh("cat result; rm result")).stdout).toBe("mine\n")
  })

  test("with several, the others are made although one is in the way", async () => {
    await p.sh("rm -rf ignored* && echo mine >ignored")
    writeFiles(p.client.outside("/root/p"), { ".git/info/exclude": "/ignored*\n" })
    const { code } = await p.edict(["h", "nix", "build", ".#hello", ".#chain", "-o", "ignored"])
    expect(code).toBe(254)
    expect((await p.sh("cat ignored; readlink ignored-1")).stdout).toMatch(/^mine\n\/nix\/store\/\S+\n$/)
    await p.sh("rm -rf ignored*")
  })

  test("stateless: the link appears where one is, and nothing else travels", async () => {
    await p.client.sh("mkdir -p /root/elsewhere && echo secret >/root/elsewhere/file && rm -f /root/p/result")
    const before = await p.sh("git status --porcelain=v2 --branch")
    const { code } = await p.sh("cd /root/elsewhere && edict h nix build ../p#hello")
    expect(code).toBe(0)
    expect(target("/root/elsewhere/result")).toStartWith("/nix/store/")
    expect(await invalid(p.client, [target("/root/elsewhere/result")])).toBe("")
    expect((await p.client.sh("ls -A /root/elsewhere")).stdout).toBe("file\nresult\n")
    expect(await p.sh("git status --porcelain=v2 --branch")).toEqual(before)
    const { stdout } = await p.host.sh(
      "cd .cache/edict/*/tree/root && ls -A . elsewhere && grep -rl secret /root/.cache/edict",
    )
    expect(stdout).toBe(".:\nelsewhere\np\n\nelsewhere:\nresult\n")
  })

  test("from the home directory itself", async () => {
    const { code, stderr } = await p.sh("cd && edict h nix build ./p#hello")
    expect({ code, stderr }).toMatchObject({ code: 0 })
    expect(target("/root/result")).toStartWith("/nix/store/")
    const { stdout } = await p.host.sh(
      "cd .cache/edict/*/tree/root && find . -maxdepth 1 ! -name p ! -name elsewhere | sort",
    )
    expect(stdout).toBe(".\n./result\n")
    await p.client.sh("rm /root/result")
  })

  test("a store path of the host: nothing of this machine is needed", async () => {
    const { stdout } = await p.host.sh("echo over there >/root/f; nix-store --add /root/f")
    const path = stdout.trim()
    const { code } = await p.sh(`cd /root/elsewhere && rm -f result && edict h nix build ${path}`)
    expect(code).toBe(0)
    expect(target("/root/elsewhere/result")).toBe(path)
    expect(readFileSync(p.client.outside(path), "utf8")).toBe("over there\n")
  })

  test("a link names a store path for the next command, which takes it there", async () => {
    const { stdout } = await p.client.sh(
      "cd && echo local >f && nix-store --add f && ln -sfn $(nix-store --add f) p/mine && rm f",
    )
    const path = stdout.trim()
    expect(existsSync(p.host.outside(path))).toBeFalse()
    const answer = await p.edict(["h", "nix", "path-info", "./mine"])
    expect(answer).toMatchObject({ code: 0, stdout: `${path}\n` })
    expect(readFileSync(p.host.outside(path), "utf8")).toBe("local\n")
    await p.sh("rm mine")
  })

  test("--no-link brings nothing here", async () => {
    await p.sh("rm -f result* d/x; nix-store --gc")
    const { code, stderr } = await p.edict(["h", "nix", "build", ".#big", "--no-link"])
    expect(code).toBe(0)
    expect(stderr).not.toContain("edict:")
    expect((await p.client.sh("ls -d /nix/store/*-big")).stdout).toBe("")
  })

  test("--report tells of links", async () => {
    expect(
      (await p.edict(["--report", "/root/report.json", "h", "nix", "build", ".#hello", "-o", "d/r"])).code,
    ).toBe(0)
    const report: unknown = JSON.parse(readFileSync(p.client.outside("/root/report.json"), "utf8"))
    expect(report).toMatchObject({
      host: "h",
      exitCode: 0,
      resultLinks: [{ link: "/root/p/d/r", target: target("/root/p/d/r") }],
    })
  })
})

describe("without Nix here", () => {
  test("the command runs, the last line says where the result lies, and no link dangles", async () => {
    await using p = await project({ client: { nix: "none" } })
    const { code, stdout, stderr } = await p.edict(["h", "nix", "build", ".#hello"])
    expect({ code, stdout }).toEqual({ code: 0, stdout: "" })
    const line = stderr.trimEnd().split("\n").at(-1) ?? ""
    const path =
      /^edict: no nix here: result is (\/nix\/store\/\S+) on h$/.exec(line)?.[1] ?? `not in: ${line}`
    expect((await p.host.run(["cat", path])).stdout).toBe("hello\n")
    expect(await links(p.client)).toEqual([])
    expect((await p.edict(["h", "nix", "run", ".#cat"], { stdin: "a\0b" })).stdout).toBe("a\0b")
    expect((await p.client.sh(`${EDICT} h nix eval --expr 1`)).stdout).toBe("1\n")
  })
})
