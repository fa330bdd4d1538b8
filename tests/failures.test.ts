// What goes wrong: one line that says what, why and what to type; nothing lost, nothing left running.
import { afterAll, beforeAll, describe, expect, test } from "bun:test"
import { existsSync, readFileSync } from "node:fs"
import { nixAvailable, type Result } from "./lab/lab"
import { EDICT, project, type Project } from "./support"

/** The lines of edict itself. */
const ownLines = (stderr: string): string[] => stderr.split("\n").filter((line) => line.startsWith("edict:"))

/** Expects one line of edict's, and no word of anybody else but for `others`. */
function expectOneLine(
  { code, stderr }: Result,
  expected: { code: 254 | 255; says: RegExp; others?: RegExp },
): void {
  const lines = ownLines(stderr)
  expect(lines).toHaveLength(1)
  expect(lines[0]).toMatch(expected.says)
  expect(lines[0]).not.toContain("this is a bug")
  const rest = stderr.split("\n").filter((line) => line !== "" && !line.startsWith("edict:"))
  expect(rest.filter((line) => !expected.others?.test(line))).toEqual([])
  expect(code).toBe(expected.code)
}

/** Waits until nothing of a run is left on both machines, but for the shared connection. */
async function expectNothingLeft(p: Project): Promise<void> {
  const shared = /^\d+ (sshd|ssh: \S+ \[mux\]|ssh .*ControlMaster=yes .* -f -N -- )/
  let left: string[] = []
  for (const end = performance.now() + 15_000; performance.now() < end; await Bun.sleep(200)) {
    const processes = (await Promise.all([p.host.processes(), p.client.processes()])).flat()
    left = processes.filter((line) => !shared.test(line))
    if (left.length === 0) break
  }
  expect(left).toEqual([])
}

/** All files of the project with their modes and contents; .git apart. */
const snapshot = async (p: Project): Promise<string> =>
  (
    await p.sh(
      "find . -name .git -prune -o -type f -exec stat -c '%n %a %s' {} + -exec sha256sum {} + | sort",
    )
  ).stdout

/** A command that would tell of itself, if it ran, on both machines. */
const TELLTALE = ["nix", "develop", "-c", "sh", "-c", "echo ran; echo ran >/root/ran; echo ran >ran.txt"]

describe("before anything runs", () => {
  let p: Project

  beforeAll(async () => {
    p = await project()
    await p.client.sh("mkdir -p /root/empty")
  })

  afterAll(() => p[Symbol.asyncDispose]())

  const mistakes: [argv: string[], says: RegExp][] = [
    [["--sinc", "h", "nix", "build"], /unknown option --sinc; try: edict --sync$/],
    [["h", "--sync", "nix", "build"], /option --sync stands behind the host; try: edict --sync h …$/],
    [[], /no host and no command given; try: edict HOST nix build \.#x$/],
    [["h"], /no command given for host h; try: edict h nix build$/],
    [
      ["nix", "build"],
      /no host given, and no default; try: edict HOST nix build, or: default = "HOST" in \/root\//,
    ],
    [["--", "-oProxyCommand=touch${IFS}/root/pwned", "nix", "build"], /has characters outside/],
    [["--", "-Fx", "nix", "build"], /host -Fx starts with -; try: a host is \[user@\]host/],
    [["ssh://-oProxyCommand", "nix", "build"], /starts with -/],
    [["root@-h", "nix", "build"], /starts with -/],
    [["--config", "/nowhere", "h", "nix", "build"], /\/nowhere: cannot read the host config/],
    [
      ["h", "nix", "build", "./nowhere"],
      /\.\/nowhere: there is no \/root\/p\/nowhere here; try: check the path/,
    ],
    [
      ["h", "nix", "build", "../empty"],
      /\.\.\/empty is no flake: .*; try: cd into a directory with a flake\.nix/,
    ],
    [["h", "./hello.txt#x"], /\.\/hello\.txt#x is no flake: \/root\/p\/hello\.txt is a file/],
    [["h", "nix", "build", "-f", "gone.nix"], /gone\.nix: there is no \/root\/p\/gone\.nix here/],
  ]
  test.each(mistakes)("%j", async (argv, says) => {
    const result = await p.edict(argv)
    expectOneLine(result, { code: 254, says })
    expect(result.stdout).toBe("")
  })

  test("none of them reached the host or wrote here", async () => {
    expect(existsSync(p.host.outside("/root/.cache/edict"))).toBeFalse()
    expect(existsSync(p.client.outside("/root/pwned"))).toBeFalse()
    expect((await p.client.sh("ls -d .cache/edict .local/state/edict/* 2>/dev/null")).stdout).toBe("")
    expect((await p.sh("git status --porcelain")).stdout).toBe("")
    await expectNothingLeft(p)
  })
})

describe("ssh fails: 255", () => {
  let p: Project

  beforeAll(async () => {
    p = await project()
  })

  afterAll(() => p[Symbol.asyncDispose]())

  const unreachable: [argv: string[], says: RegExp][] = [
    [["nosuch"], /cannot reach nosuch: .*Could not resolve hostname.*; try: check the name/],
    [
      ["-p", "1", "root@127.0.0.1"],
      /cannot reach root@127\.0\.0\.1: .*refused; try: ssh -v root@127\.0\.0\.1 true/,
    ],
    [
      ["-F", "/dev/null", "-o", "StrictHostKeyChecking=yes", "-o", "HostName=127.0.0.1", "h"],
      /cannot reach h: .*; try: ssh /,
    ],
    [
      ["-o", "UserKnownHostsFile=/dev/null", "h"],
      /cannot reach h: .*[Hh]ost key verification failed.*; try: ssh h true/,
    ],
    [["-o", "Nonsense=1", "h"], /cannot reach h: .*; try: ssh -v h true/],
  ]
  test.each(unreachable)("%j", async (argv, says) => {
    const before = await snapshot(p)
    const result = await p.edict([...argv, ...TELLTALE])
    expectOneLine(result, { code: 255, says })
    expect(result.stdout).toBe("")
    expect(await snapshot(p)).toBe(before)
    await expectNothingLeft(p)
  })

  test("a login that is refused", async () => {
    await p.host.sh("mv .ssh/authorized_keys .ssh/away")
    const result = await p.edict(["h", ...TELLTALE])
    await p.host.sh("mv .ssh/away .ssh/authorized_keys")
    expectOneLine(result, { code: 255, says: /cannot reach h: .*Permission denied.*; try: ssh h true/ })
    expect((await p.edict(["h", "nix", "eval", "--expr", "1"])).stdout).toBe("1\n")
  })
})

describe("a program is missing here", () => {
  test.each(["git", "ssh", "bash"])("%s", async (program) => {
    await using p = await project({ client: { hide: [program] }, git: false })
    await p.sh("mkdir .git")
    const result = await p.edict(["h", ...TELLTALE])
    expectOneLine(result, { code: 254, says: new RegExp(`no ${program} here.*; try: install ${program}$`) })
    expect(result.stdout).toBe("")
    expect(existsSync(p.host.outside("/root/.cache/edict"))).toBeFalse()
    await p.sh("rmdir .git")
    // Outside of git, git is not needed.
    const other = program === "git" ? ["nix", "build"] : ["nix", "eval", "--expr", "1"]
    expect((await p.edict(["h", ...other])).code).toBe(program === "git" ? 0 : 254)
  })
})

const newer = await nixAvailable("2.26")
describe("a program is missing there", () => {
  test("nix", async () => {
    await using p = await project({ host: { nix: "none" } })
    const before = await snapshot(p)
    const result = await p.edict(["h", ...TELLTALE])
    expectOneLine(result, { code: 254, says: /no nix over there.*; install Nix there/ })
    expect(await snapshot(p)).toBe(before)
    await expectNothingLeft(p)
  })

  test.skipIf(newer !== true)("git, where Nix does not need it either", async () => {
    await using p = await project({ host: { hide: ["git"], nix: "2.26" } })
    expect(await p.edict(["h", "nix", "build", ".#hello"])).toMatchObject({ code: 0 })
    expect((await p.sh("cat result")).stdout).toBe("hello\n")
    expect((await p.edict(["h", ".#bump"])).code).toBe(0)
    expect(readFileSync(p.file("version.txt"), "utf8")).toBe("2\n")
  })

  test("git, where Nix does: its own words and exit code", async () => {
    await using p = await project({ host: { hide: ["git"] } })
    const { code, stderr } = await p.edict(["h", "nix", "build", ".#hello"])
    expect(code).toBe(1)
    expect(stderr).toContain("'git'")
    expect(stderr).not.toContain("this is a bug")
  })
})

describe("no space", () => {
  test("there, during the upload: the command does not run; with space it does", async () => {
    await using p = await project({ host: { diskLimit: "20m" } })
    expect((await p.edict(["h", "nix", "eval", ".#lib.answer"])).stdout).toBe("42\n")
    await p.sh("head -c 40000000 /dev/urandom >big; echo edited >hello.txt")
    const before = await snapshot(p)
    const result = await p.edict(["h", ...TELLTALE])
    expectOneLine(result, {
      code: 254,
      says: /upload of \/root\/p failed.*No space left on device.*; try: free some space on h/,
    })
    expect(result.stdout).toBe("")
    expect((await p.host.sh("ls /root/ran")).stdout).toBe("")
    expect(await snapshot(p)).toBe(before)
    await expectNothingLeft(p)
    await p.sh("rm big")
    expect((await p.edict(["h", "nix", "develop", "-c", "cat", "hello.txt"])).stdout).toBe("edited\n")
  })

  test("here, during the sync back: nothing is half; with space all of it comes home", async () => {
    await using p = await project()
    await p.client.sh("mv p q && mkdir p && mount -t tmpfs -o size=2m tmpfs p && cp -a q/. p")
    const before = await snapshot(p)
    const script = "head -c 4000000 /dev/zero >big; echo changed >hello.txt; rm old.txt"
    const result = await p.edict(["h", "nix", "develop", "-c", "sh", "-c", script])
    expectOneLine(result, {
      code: 254,
      says: /no space left|No space left/,
      others: /^(building|error \(ignored\))/,
    })
    expect(ownLines(result.stderr)[0]).toMatch(/; try: free some space/)
    expect(await snapshot(p)).toBe(before)
    await expectNothingLeft(p)

    await p.client.sh("mount -o remount,size=20m /root/p")
    const next = await p.edict(["h", "nix", "eval", ".#lib.answer"])
    expect({ code: next.code, stdout: next.stdout }).toEqual({ code: 0, stdout: "42\n" })
    expect((await p.sh("stat -c %s big")).stdout).toBe("4000000\n")
    expect((await p.sh("git status --porcelain")).stdout).toBe(" M hello.txt\n D old.txt\n?? big\n")
  })
})

describe("files and directories here", () => {
  let p: Project

  beforeAll(async () => {
    p = await project()
  })

  afterAll(() => p[Symbol.asyncDispose]())

  test("a file that cannot be read: named, and nothing runs", async () => {
    await p.sh("echo more >>hello.txt && chmod 0 hello.txt")
    const asUser = ["setpriv", "--bounding-set=-dac_override,-dac_read_search", EDICT]
    const result = await p.client.run([...asUser, "h", ...TELLTALE], { cwd: p.dir })
    expectOneLine(result, {
      code: 254,
      says: /cannot read \/root\/p\/hello\.txt: .*permission denied.*; try: ls -l \/root\/p\/hello\.txt$/,
    })
    expect(result.stdout).toBe("")
    expect(existsSync(p.host.outside("/root/ran"))).toBeFalse()
    await p.sh("chmod 644 hello.txt && git checkout -q hello.txt")
    await expectNothingLeft(p)
  })

  const places: [string, Record<string, string>, string[], RegExp][] = [
    ["state", { XDG_STATE_HOME: "/dev/null/x" }, [], /\/dev\/null\/x.*; try: /],
    ["cache", { XDG_CACHE_HOME: "/dev/null/x" }, [], /\/dev\/null\/x.*; try: /],
  ]
  test.each(places)(
    "no place for %s: nothing runs, and the end comes at once",
    async (_, env, argv, says) => {
      const began = performance.now()
      const result = await p.edict([...argv, "h", ...TELLTALE], { env })
      expectOneLine(result, { code: 254, says })
      expect(result.stdout).toBe("")
      expect(performance.now() - began).toBeLessThan(10_000)
      expect(existsSync(p.host.outside("/root/ran"))).toBeFalse()
      await expectNothingLeft(p)
    },
  )

  test("a cache on another file system than the repository", async () => {
    await p.client.sh("mkdir cache && mount -t tmpfs tmpfs cache")
    const env = { XDG_CACHE_HOME: "/root/cache" }
    expect(await p.edict(["h", "nix", "eval", ".#lib.answer"], { env })).toMatchObject({
      code: 0,
      stdout: "42\n",
    })
    expect((await p.sh("find .git/objects -name 'tmp_*'")).stdout).toBe("")
  })
})

describe("the connection ends", () => {
  test("during the upload: 255, the command does not run, and the next run does all of it", async () => {
    // A host whose rsync says that it begins, and then takes its time. (Hiding one gives it a /usr/bin of its own.)
    await using p = await project({ host: { hide: ["rsync"], delay: 0 } })
    const slow =
      '#!/bin/sh\n[ "$1" = --version ] || { touch /root/begun; sleep 3; }\nexec /run/lab/usr/bin/rsync "$@"\n'
    await p.host.sh("cat >/usr/bin/rsync && chmod +x /usr/bin/rsync", { stdin: slow })
    const before = await snapshot(p)
    const running = p.spawn(["h", ...TELLTALE])
    running.end()
    for (let n = 0; n < 200 && !existsSync(p.host.outside("/root/begun")); n++) await Bun.sleep(50)
    await p.host.dropConnections()
    const result = await running.result
    expectOneLine(result, {
      code: 255,
      says: /the connection to h (was lost during the upload|ended)/,
      others: /^(Connection|client_loop|mux_client|Shared connection|rsync)/,
    })
    expect(result.stdout).toBe("")
    await expectNothingLeft(p)
    expect(existsSync(p.host.outside("/root/ran"))).toBeFalse()
    expect(await snapshot(p)).toBe(before)

    await p.host.sh("ln -sf /run/lab/usr/bin/rsync /usr/bin/rsync")
    const next = await p.edict(["h", ...TELLTALE])
    expect({ code: next.code, stdout: next.stdout }).toEqual({ code: 0, stdout: "ran\n" })
    expect(readFileSync(p.file("ran.txt"), "utf8")).toBe("ran\n")
  })

  test("while the command runs: 255, it ends over there, and its changes come home with the next run", async () => {
    await using p = await project({ host: { delay: 0 } })
    const script = "echo half >hello.txt; echo started; sleep 300; echo never >hello.txt"
    const running = p.spawn(["h", "nix", "develop", "-c", "sh", "-c", script])
    running.end()
    await running.waitFor("started")
    await p.host.dropConnections()
    const result = await running.result
    expect(result.code).toBe(255)
    expect(ownLines(result.stderr)).toHaveLength(1)
    await expectNothingLeft(p)
    const next = await p.edict(["h", "nix", "eval", ".#lib.answer"])
    expect({ code: next.code, stdout: next.stdout }).toEqual({ code: 0, stdout: "42\n" })
    expect(readFileSync(p.file("hello.txt"), "utf8")).toBe("half\n")
  })
})
