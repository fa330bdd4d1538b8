// What commands change comes home: flake.lock, formatted files, and all that a program of the flake does.
import { afterAll, beforeAll, describe, expect, test } from "bun:test"
import { existsSync, readFileSync, statSync } from "node:fs"
import { GIT_INIT, writeFiles, writeFlake, writeInput } from "./lab/flake"
import { nixAvailable, type NixVersion } from "./lab/lab"
import { project, type Project } from "./support"

type Lock = { nodes: Record<string, { locked?: { narHash?: string; path?: string } }> }

/** Hashes of the locked inputs, by name. */
function locked(text: string): Record<string, string> {
  const inputs = Object.entries((JSON.parse(text) as Lock).nodes).filter(([name]) => name !== "root")
  return Object.fromEntries(inputs.map(([name, { locked: input }]) => [name, input?.narHash ?? ""]))
}

/** A flake with the inputs `dep` and `other`. */
const TWO_INPUTS = `{
  inputs.dep.url = "path:/srv/dep";
  inputs.other.url = "path:/srv/other";
  outputs = { dep, other, ... }: { values = [ dep.value other.value ]; };
}
`

const versions: NixVersion[] = ["2.8", "2.26", "2.34"]
for (const nix of versions) {
  const available = await nixAvailable(nix)
  describe.skipIf(available !== true)(`flake.lock with Nix ${nix} over there`, () => {
    let p: Project

    /** Sets what the inputs are over there, where Nix looks for them. */
    const setInputs = async (dep: string, other: string) => {
      await p.host.sh("rm -rf /srv/dep /srv/other; mkdir -p /srv/dep /srv/other")
      writeInput(p.host.outside("/srv/dep"), dep)
      writeInput(p.host.outside("/srv/other"), other)
    }
    const lock = () => locked(readFileSync(p.file("flake.lock"), "utf8"))

    beforeAll(async () => {
      p = await project({
        host: { nix },
        flake: { files: { "flake.nix": TWO_INPUTS, "sub/note": "note\n" } },
      })
      await setInputs("1", "1")
    })

    afterAll(() => p[Symbol.asyncDispose]())

    test("flake lock makes it", async () => {
      const { code, stderr } = await p.edict(["h", "nix", "flake", "lock"])
      expect({ code, stderr }).toEqual({
        code: 0,
        stderr: expect.stringContaining("edict: 1 file changed here: flake.lock\n"),
      })
      expect(Object.keys(lock())).toEqual(["dep", "other"])
      await p.sh("git add flake.lock && git commit -qm lock")
    })

    test("a second time nothing changes", async () => {
      const before = statSync(p.file("flake.lock"), { bigint: true })
      const { code, stderr } = await p.edict(["h", "nix", "flake", "lock"])
      expect({ code, stderr }).toEqual({ code: 0, stderr: "" })
      expect(statSync(p.file("flake.lock"), { bigint: true }).ctimeNs).toBe(before.ctimeNs)
    })

    let round = 1
    const whole: [cwd: string, argv: string[]][] = [
      [".", ["nix", "flake", "update"]],
      [".", ["nix", "flake", "update", "."]],
      [".", ["nix", "flake", "update", "/root/p"]],
      ["sub", ["nix", "flake", "update"]],
      ["sub", ["nix", "flake", "update", ".."]],
    ]
    test.each(whole)("in %s: %j updates all inputs", async (cwd, argv) => {
      const before = lock()
      const value = String(++round)
      await setInputs(value, value)
      const { code, stderr } = await p.edict(["h", ...argv], { cwd: `/root/p/${cwd}` })
      expect(code).toBe(0)
      expect(stderr).toMatch(/edict: 1 file changed here: (\.\.\/)?flake.lock\n$/)
      expect(lock().dep).not.toBe(before.dep)
      expect(lock().other).not.toBe(before.other)
      expect((await p.edict(["h", "nix", "eval", "--json", ".#values"])).stdout.trim()).toBe(
        `["${value}","${value}"]`,
      )
      await p.sh("git add flake.lock && git commit -qm update")
    })

    test("one input, by name or by option", async () => {
      const before = lock()
      await setInputs("next", "next")
      const words = nix === "2.8" ? ["flake", "lock", "--update-input", "dep"] : ["flake", "update", "dep"]
      expect((await p.edict(["h", "nix", ...words])).code).toBe(0)
      expect(lock().dep).not.toBe(before.dep)
      expect(lock().other).toBe(before.other!)
      await p.sh("git commit -qam dep")
    })

    test("from elsewhere: only flake.lock comes home, and the current directory does not travel", async () => {
      await p.client.sh("mkdir -p /root/elsewhere && echo secret >/root/elsewhere/file")
      const before = lock()
      await setInputs("far", "far")
      const words = nix === "2.8" ? ["../p"] : ["--flake", "../p"]
      const { code, stderr } = await p.edict(["h", "nix", "flake", "update", ...words], {
        cwd: "/root/elsewhere",
      })
      expect({ code, stderr }).toMatchObject({ code: 0 })
      expect(stderr).toEndWith("edict: 1 file changed here: ../p/flake.lock\n")
      expect(lock().dep).not.toBe(before.dep)
      expect((await p.sh("git status --porcelain")).stdout).toBe(" M flake.lock\n")
      expect((await p.client.sh("ls -A /root/elsewhere")).stdout).toBe("file\n")
      expect((await p.host.sh("grep -rl secret /root/.cache/edict")).stdout).toBe("")
      await p.sh("git commit -qam far")
    })

    test("from elsewhere, the flake as a positional: works on both sides of Nix 2.19", async () => {
      const before = lock()
      await setInputs("farther", "farther")
      expect(
        (await p.edict(["h", "nix", "flake", "update", "/root/p"], { cwd: "/root/elsewhere" })).code,
      ).toBe(0)
      expect(lock().dep).not.toBe(before.dep)
      await p.sh("git commit -qam farther")
    })

    test("--no-sync brings nothing", async () => {
      const before = readFileSync(p.file("flake.lock"), "utf8")
      await setInputs("no", "no")
      const { code, stderr } = await p.edict(["--no-sync", "h", "nix", "flake", "update"])
      expect(code).toBe(0)
      expect(stderr).not.toContain("edict:")
      expect(readFileSync(p.file("flake.lock"), "utf8")).toBe(before)
      // The next run starts from what is here.
      expect((await p.edict(["h", "nix", "eval", "--json", ".#values"])).stdout.trim()).not.toContain("no")
    })
  })
}

describe("files that a command changes", () => {
  let p: Project

  beforeAll(async () => {
    p = await project({ flake: { files: { ".gitignore": "/ignored/\n", "mode.txt": "mode\n" } } })
  })

  afterAll(() => p[Symbol.asyncDispose]())

  const status = async () => (await p.sh("git status --porcelain")).stdout.split("\n").slice(0, -1)
  const reset = () => p.sh("git reset -q --hard && git clean -qfdx")

  test("edict h .#bump: an edit, a new file in a new directory, a deletion, a mode", async () => {
    const { code, stdout, stderr } = await p.edict(["h", ".#bump"])
    expect({ code, stdout }).toEqual({ code: 0, stdout: "" })
    expect(stderr).toMatch(/edict: 4 files changed here: [^\n]*\n$/)
    expect(await status()).toEqual([" D old.txt", " M script.sh", " M version.txt", "?? new/"])
    expect(readFileSync(p.file("version.txt"), "utf8")).toBe("2\n")
    expect(readFileSync(p.file("new/file.txt"), "utf8")).toBe("new\n")
    expect(statSync(p.file("script.sh")).mode & 0o777).toBe(0o755)
    expect(statSync(p.file("new/file.txt")).mode & 0o777).toBe(0o644)
    expect(existsSync(p.file("old.txt"))).toBeFalse()
  })

  test("again and again, each from where the last one ended", async () => {
    for (const version of ["3\n", "4\n"]) {
      expect((await p.edict(["h", ".#bump"])).code).toBe(0)
      expect(readFileSync(p.file("version.txt"), "utf8")).toBe(version)
    }
    await reset()
    expect((await p.edict(["h", ".#bump"])).code).toBe(0)
    expect(readFileSync(p.file("version.txt"), "utf8")).toBe("2\n")
    expect(await status()).toEqual([" D old.txt", " M script.sh", " M version.txt", "?? new/"])
    await reset()
  })

  test("a command that fails: its changes and its exit code", async () => {
    const { code } = await p.edict(["h", "nix", "develop", "-c", "sh", "-c", "echo half >hello.txt; exit 9"])
    expect(code).toBe(9)
    expect(await status()).toEqual([" M hello.txt"])
    await reset()
  })

  test("nix fmt, all and one", async () => {
    await p.sh("printf 'x  \\n' >other.txt; git add other.txt")
    expect((await p.edict(["h", "nix", "fmt", "untidy.txt"])).code).toBe(0)
    expect(readFileSync(p.file("untidy.txt"), "utf8")).toBe("blanks at the end\n")
    expect(readFileSync(p.file("other.txt"), "utf8")).toBe("x  \n")
    expect((await p.edict(["h", "nix", "fmt"])).code).toBe(0)
    expect(readFileSync(p.file("other.txt"), "utf8")).toBe("x\n")
    await reset()
  })

  const oddities: [what: string, script: string, see: string, seen: string][] = [
    [
      "names",
      `mkdir "a b" && echo 1 >"a b/ü
%'x" && echo 2 >./-n`,
      `cat "a b/ü
%'x" ./-n`,
      "1\n2\n",
    ],
    [
      "an empty file and one with NULs",
      "true >e; printf 'a\\0b\\377' >n",
      "wc -c <e; od -An -tx1 n",
      "0\n 61 00 62 ff\n",
    ],
    ["a relative link", "ln -s hello.txt l", "readlink l; cat l", "hello.txt\nhello\n"],
    [
      "a file becomes a directory",
      "rm hello.txt; mkdir hello.txt; echo in >hello.txt/f",
      "cat hello.txt/f",
      "in\n",
    ],
    [
      "a rename",
      "mv hello.txt renamed.txt",
      "cat renamed.txt; ls hello.txt 2>&1 | grep -c 'No such'",
      "hello\n1\n",
    ],
    ["an edit of the same size", "printf 'HELLO\\n' >hello.txt", "cat hello.txt", "HELLO\n"],
    [
      "an old time stamp",
      "printf 'HELLO\\n' >h; touch -r hello.txt h; mv h hello.txt",
      "cat hello.txt",
      "HELLO\n",
    ],
    ["execute permission taken away", "chmod +x mode.txt", "stat -c %a mode.txt", "755\n"],
  ]
  test.each(oddities)("%s", async (_, script, see, seen) => {
    const { code, stderr } = await p.edict(["h", "nix", "develop", "-c", "sh", "-ec", script])
    expect({ code, stderr }).toEqual({
      code: 0,
      stderr: expect.stringMatching(/edict: \d files? changed here/),
    })
    expect(await p.sh(see)).toMatchObject({ stdout: seen })
    await reset()
  })

  test("ignored files stay where they are, on both sides", async () => {
    await p.sh("mkdir -p ignored && echo here >ignored/file")
    expect(
      (await p.edict(["h", "nix", "develop", "-c", "sh", "-c", "mkdir -p ignored; echo there >ignored/file"]))
        .code,
    ).toBe(0)
    expect(readFileSync(p.file("ignored/file"), "utf8")).toBe("here\n")
    expect((await p.edict(["h", "nix", "develop", "-c", "cat", "ignored/file"])).stdout).toBe("there\n")
  })

  test("--no-sync: the command works, nothing of it comes home, and the next run does not see it", async () => {
    const { code, stderr } = await p.edict(["--no-sync", "h", ".#bump"])
    expect(code).toBe(0)
    expect(stderr).not.toContain("changed here")
    expect(await status()).toEqual([])
    expect((await p.edict(["h", "nix", "develop", "-c", "cat", "version.txt", "old.txt"])).stdout).toBe(
      "1\nold\n",
    )
    expect(await status()).toEqual([])
  })

  test("--sync: a directory that is no flake travels, and its changes come home", async () => {
    writeFiles(p.client.outside("/root/plain"), { "file.txt": "a\n", "deep/gone.txt": "b\n" })
    const script = "cat file.txt; echo c >file.txt; rm -r deep; mkdir new; echo d >new/f"
    const argv = ["h", "nix", "develop", "/root/p", "-c", "sh", "-c", script]
    const { code, stdout } = await p.edict(["--sync", ...argv], { cwd: "/root/plain" })
    expect({ code, stdout }).toEqual({ code: 0, stdout: "a\n" })
    expect((await p.client.sh("cd plain && find . -type f | sort && cat file.txt new/f")).stdout).toBe(
      "./file.txt\n./new/f\nc\nd\n",
    )
  })

  test("without --sync it does not", async () => {
    writeFiles(p.client.outside("/root/other"), { "file.txt": "a\n" })
    const argv = ["h", "nix", "develop", "/root/p", "-c", "sh", "-c", "ls; echo x >made"]
    const { code, stdout } = await p.edict(argv, { cwd: "/root/other" })
    expect({ code, stdout }).toEqual({ code: 0, stdout: "" })
    expect((await p.client.sh("ls other")).stdout).toBe("file.txt\n")
  })

  test("a flake that lies in no repository", async () => {
    writeFlake(p.client.outside("/root/bare"))
    const { code } = await p.edict(["h", ".#bump"], { cwd: "/root/bare" })
    expect(code).toBe(0)
    expect(
      (await p.client.sh("cd bare && cat version.txt new/file.txt; ls old.txt; find . -name '.edict*'"))
        .stdout,
    ).toBe("2\nnew\n")
  })

  test("a command in a subdirectory of the repository changes all of it", async () => {
    await p.sh(`${GIT_INIT} 2>/dev/null; mkdir -p sub && echo s >sub/s && git add sub && git commit -qm sub`)
    const argv = ["h", "nix", "develop", "-c", "sh", "-c", "echo t >s; echo up >../hello.txt"]
    expect((await p.edict(argv, { cwd: "/root/p/sub" })).code).toBe(0)
    expect(await status()).toEqual([" M hello.txt", " M sub/s"])
    await reset()
  })

  test("--report lists what changed", async () => {
    expect((await p.edict(["--report", "/root/r.json", "h", ".#bump"])).code).toBe(0)
    const report = JSON.parse(readFileSync(p.client.outside("/root/r.json"), "utf8")) as { changed: string[] }
    expect(report.changed.toSorted()).toEqual(["new/file.txt", "old.txt", "script.sh", "version.txt"])
  })
})
