// Other userlands: hosts with BusyBox alone, machines with the programs of macOS, no rsync or Apple's, other shells.
import { afterAll, beforeAll, describe, expect, setDefaultTimeout, test } from "bun:test"
import { existsSync, lstatSync, readFileSync, writeFileSync } from "node:fs"
import { join } from "node:path"
import { encodeWord, REMOTE_RAW, unfitRsync } from "../edict"
import {
  edict,
  expectNoBrood,
  expectSame,
  mainExamples,
  makePair,
  remoteOf,
  script,
  startBrood,
  type Pair,
} from "./examples"
import { startClient, startHost, type ClientOptions, type HostOptions } from "./lab/lab"
import { EDICT } from "./support"

setDefaultTimeout(120_000)

type Machines = Pair & AsyncDisposable

/** A host and a client of these kinds, with a project. */
async function pairOf(
  host: Partial<HostOptions>,
  client: Partial<ClientOptions> = {},
  dir = "/root/p",
): Promise<Machines> {
  const over = await startHost({ name: "h", ...host })
  const here = await startClient({ ...client, hosts: [over] })
  const pair = { host: over, client: here, dir }
  await makePair(pair)
  return { ...pair, [Symbol.asyncDispose]: async () => void (await Promise.all([here.stop(), over.stop()])) }
}

/** What was asked of programs with the habits of macOS that they do not know, but for looking who is there. */
async function refused(machine: Pair["client"] | Pair["host"]): Promise<string[]> {
  const { stdout } = await machine.sh("cat /root/.bsd.log 2>/dev/null")
  const probes = /^(find --version|stat -c|dd --version|touch @\d+|)$/
  return stdout.split("\n").filter((line) => !probes.test(line))
}

test.each([
  ["rsync  version 3.2.7  protocol version 31", undefined],
  ["rsync  version 2.6.9  protocol version 29", undefined],
  ["rsync  version v3.4.1  protocol version 32", undefined],
  ["openrsync: protocol version 29", "openrsync"],
  ["", "no rsync"],
  ["bash: rsync: Permission denied", "bash"],
])("rsync that says %j", (version, unfit) => {
  expect(unfitRsync(version)).toBe(unfit)
})

/** printf as FreeBSD's sh has it: %b ends at the first NUL. */
const CUTTING = String.raw`nul='\0000'
printf() { case $1 in %b) command printf %b "${"$"}{2%%"$nul"*}" ;; *) command printf "$@" ;; esac; }
`

describe("encoded text is printed with all its NULs", () => {
  const texts = [
    "",
    "a",
    "a\0b",
    "\0",
    "\0\0",
    "a\n\0\n",
    "\0a\0\0b\n",
    "back\\slash\\0000\0x",
    "-n\0-e",
    "%s\0%b\0",
  ]
  test.each(["dash", "bash", "busybox", "mksh", "yash", "zsh"])("by %s", (shell) => {
    if (!Bun.which(shell)) return console.log(`skipped: no ${shell}`)
    const argv =
      shell === "busybox" ? ["busybox", "sh"] : shell === "zsh" ? ["zsh", "--emulate", "sh"] : [shell]
    for (const printf of ["", CUTTING])
      for (const text of texts) {
        const script = `${printf}${REMOTE_RAW}raw "$1"`
        const { stdout, stderr } = Bun.spawnSync([
          ...argv,
          "-c",
          script,
          "sh",
          text && encodeWord(text, "latin1"),
        ])
        expect({ printf, text: stdout.toString("latin1"), errors: stderr.toString() }).toEqual({
          printf,
          text,
          errors: "",
        })
      }
  })
})

// ── The main examples ───

const kinds: [
  name: string,
  host: Partial<HostOptions>,
  client: Partial<ClientOptions>,
  says: string | undefined,
][] = [
  ["BusyBox, rsync and Nix alone", { busybox: true }, {}, undefined],
  ["BusyBox without rsync", { busybox: true, hide: ["rsync"] }, {}, "no rsync on h"],
  ["the programs of macOS there", { bsd: true }, {}, "openrsync on h"],
  ["the programs of macOS here", {}, { bsd: true }, "openrsync here"],
  ["the programs of macOS on both sides", { bsd: true, shell: "zsh" }, { bsd: true }, "openrsync here"],
  ["no rsync here, BusyBox there", { busybox: true }, { hide: ["rsync"] }, "no rsync here"],
]
describe.concurrent("the main examples", () => {
  test.each(kinds)("%s", async (_, host, client, says) => {
    await using pair = await pairOf(host, client)
    await firstUpload(pair, says)
    await mainExamples(pair)
    await signalsAndKills(pair)
    await otherActions(pair)
    // Nothing was asked of a program that it does not know.
    expect(await refused(pair.client)).toEqual([])
    expect(await refused(pair.host)).toEqual([])
  })
})

/** Files go up by what is fit, and -v says so once. */
async function firstUpload(pair: Pair, says: string | undefined): Promise<void> {
  const result = await edict(pair, ["-v", "h", "nix", "eval", ".#lib.answer"])
  expect(result).toMatchObject({ code: 0, stdout: "42\n" })
  const said = result.stderr.match(/(?<=^edict: files go up by tar: ).*$/gm)
  expect(said).toEqual(says === undefined ? null : [says])
  expect(/^edict: \+ rsync /m.test(result.stderr)).toBe(says === undefined)
  expectSame(pair)
}

/** On Ctrl-C, and when edict is killed, the command ends with its children. */
async function signalsAndKills(pair: Pair): Promise<void> {
  const running = await startBrood(pair)
  await running.kill("SIGINT")
  expect(await running.result).toMatchObject({ code: 130, stdout: "start\n" })
  expect(readFileSync(pair.client.outside("/root/p/version.txt"), "utf8")).toBe("changed\n")
  await expectNoBrood(pair)
  const second = await startBrood(pair)
  await second.kill("SIGKILL")
  await expectNoBrood(pair)
  expect(await edict(pair, ["h", "nix", "run", ".#exit7"])).toMatchObject({ code: 7 })
}

/** Results as plain files, what edict says of the host, and what it leaves there. */
async function otherActions(pair: Pair): Promise<void> {
  const files = await edict(pair, ["--materialize", "files", "h", "nix", "build", ".#chain"])
  expect(files).toMatchObject({ code: 0, stdout: "" })
  expect(readFileSync(pair.client.outside("/root/p/files/next/next"), "utf8")).toBe("end\n")
  const doctor = await edict(pair, ["--doctor", "h"])
  expect(doctor).toMatchObject({ code: 0, stderr: "" })
  expect(doctor.stdout).toContain("the usual tools are there")
  const end = Date.now() + 10_000
  let clean = await edict(pair, ["--clean", "h"])
  // What the last run leaves to its own end may still be at work.
  for (; clean.stderr.includes("a run is using it") && Date.now() < end; await Bun.sleep(200))
    clean = await edict(pair, ["--clean", "h"])
  expect(clean).toMatchObject({ code: 0, stdout: "" })
  expect(clean.stderr).toMatch(/^edict: h: [\d.]+ MiB removed\n$/)
  expect(existsSync(pair.host.outside("/root/.cache/edict"))).toBeFalse()
}

// ── Upload by tar ───

/** Where a path of the project lies over there, seen from outside. */
const there = (pair: Pair, name: string): string => join(remoteOf(pair), name)

describe("an upload by tar", () => {
  let pair: Machines
  const put = (name: string, text: string) => writeFileSync(pair.client.outside(join(pair.dir, name)), text)
  const sh = (text: string) => pair.client.sh(text, { cwd: pair.dir })
  const touch = (...words: string[]) => edict(pair, [...words, "h", "nix", "eval", ".#lib.answer"])

  beforeAll(async () => {
    pair = await pairOf({ hide: ["rsync"], delay: 0 })
    expect(await touch()).toMatchObject({ code: 0, stdout: "42\n" })
  })
  afterAll(async () => await pair?.[Symbol.asyncDispose]())

  test("modes and times arrive as they are here", async () => {
    const made = await sh(
      `seq 20000 >a; seq 20000 >b; cp a c; chmod 640 a; chmod 755 b; chmod 444 c; touch -d '2001-02-03 04:05:06' b`,
    )
    expect(made).toMatchObject({ code: 0, stderr: "" })
    expect(await touch()).toMatchObject({ code: 0 })
    const modes = ["a", "b", "c"].map((name) => (lstatSync(there(pair, name)).mode & 0o777).toString(8))
    expect(modes).toEqual(["640", "755", "444"])
    expect(lstatSync(there(pair, "b")).mtimeMs).toBe(lstatSync(pair.client.outside("/root/p/b")).mtimeMs)
    expect(lstatSync(there(pair, "b")).uid).toBe(0)
  })

  test("two names of one file are two files there", async () => {
    await sh("mkdir twins; seq 20000 >twins/one; ln twins/one twins/two; ln twins/one three; chmod 751 three")
    expect(await touch()).toMatchObject({ code: 0 })
    const files = ["twins/one", "twins/two", "three"].map((name) => lstatSync(there(pair, name)))
    expect(files.map(({ nlink, mode }) => [nlink, (mode & 0o777).toString(8)])).toEqual([
      [1, "751"],
      [1, "751"],
      [1, "751"],
    ])
    expectSame(pair)
  })

  test("types change, directories come and go", async () => {
    await sh(`
      seq 20000 >big; git add -A; git commit -qm types; rm -r many/0; seq 20000 >many/0; rm a; mkdir -p a/b; seq 20000 >a/b/c
      rm b; ln -s a/b b; rm dangling; seq 20000 >dangling; git rm -rqf many/3`)
    expect(await touch()).toMatchObject({ code: 0 })
    expectSame(pair)
    expect(existsSync(there(pair, "many/3"))).toBeFalse()
  })

  test("a plain directory: empty directories, read-only ones, the newest time", async () => {
    await pair.client.sh(
      "mkdir -p /root/plain/empty/er /root/plain/closed; seq 20000 >/root/plain/closed/file",
    )
    const expression = `{ outputs = { self }: { time = self.lastModified; empty = builtins.readDir (self + "/empty"); }; }`
    await pair.client.sh("cat >/root/plain/flake.nix", { stdin: expression })
    await pair.client.sh("chmod 555 plain/closed plain/empty; find plain -exec touch -h -d @1000000000 {} +")
    const plain = { ...pair, dir: "/root/plain" }
    const time = await edict(plain, ["--no-sync", "h", "nix", "eval", "path:.#time"])
    expect({ code: time.code, stdout: time.stdout }).toEqual({ code: 0, stdout: "1000000000\n" })
    const empty = await edict(plain, ["--no-sync", "h", "nix", "eval", "path:.#empty"])
    expect(empty.stdout).toContain("directory")
    expectSame(plain)
  })

  test("a file that grows meanwhile is no failure, and goes again", async () => {
    put("log", "x\n".repeat(2_000_000))
    const growing = pair.client.spawn(["sh", "-c", "while :; do echo more; sleep 0.001; done >>/root/p/log"])
    const result = await touch()
    await growing.kill("SIGKILL")
    await growing.result
    expect(result).toMatchObject({ code: 0, stdout: "42\n" })
    expect(await touch()).toMatchObject({ code: 0 })
    expectSame(pair)
  })

  test("a connection that ends half-way changes nothing there; the next run does all of it", async () => {
    await pair.host.sh("rm /usr/bin/tar; cat >/usr/bin/tar; chmod +x /usr/bin/tar", {
      stdin: `#!/bin/sh\nhead -c 100000 >/root/begun; sleep 30\n`,
    })
    await sh("git rm -qf big; seq 60000 >version.txt; git add -A")
    const running = pair.client.spawn(["/bin/sh", "-c", 'exec "$@"', "sh", ...edictWords("h")], {
      cwd: pair.dir,
    })
    for (let n = 0; n < 200 && !existsSync(pair.host.outside("/root/begun")); n++) await Bun.sleep(50)
    await pair.host.dropConnections()
    const result = await running.result
    expect({ code: result.code, stdout: result.stdout }).toEqual({ code: 255, stdout: "" })
    expect(result.stderr).toContain("the connection to h was lost during the upload of /root/p")
    expect(existsSync(there(pair, "big"))).toBeTrue()
    expect(readFileSync(there(pair, "version.txt"), "utf8")).toBe("1\n")
    await pair.host.sh("ln -sf /run/lab/usr/bin/tar /usr/bin/tar")
    expect(await touch()).toMatchObject({ code: 0, stdout: "42\n" })
    expectSame(pair)
  })

  test("what stopped an upload from being put in its place does not delete what is here again", async () => {
    await sh("mkdir again; echo keep >again/file; git add -A; git commit -qm again")
    expect(await touch()).toMatchObject({ code: 0 })
    await sh("rm again/file")
    // What the agent writes first of all is a directory: nothing can be put in its place.
    await pair.host.sh("for m in .cache/edict/*/meta/*; do mkdir $m/next.new; done")
    expect(await touch()).toMatchObject({ code: 254, stdout: "" })
    await pair.host.sh("rmdir .cache/edict/*/meta/*/next.new")
    await sh("git checkout -q again/file; echo new >again/other")
    expect(await touch()).toMatchObject({ code: 0 })
    expectSame(pair)
  })

  test("a login that prints something", async () => {
    await pair.host.sh("echo 'echo welcome; printf more' >.bashrc")
    await sh("seq 70000 >version.txt")
    const result = await touch()
    expect(result).toMatchObject({ code: 0, stdout: expect.stringMatching(/42\n$/) })
    await pair.host.sh("rm .bashrc")
    expectSame(pair)
  })
})

test("a listing that was cut off is not taken for deletions", async () => {
  await using pair = await pairOf({ hide: ["rsync"] })
  const find = `#!/bin/sh
/run/lab/usr/bin/find "$@" || exit
case $* in *-printf*) if [ -e /root/broken ]; then exit 1; fi ;; esac
`
  await pair.host.sh("rm /usr/bin/find; cat >/usr/bin/find; chmod +x /usr/bin/find", { stdin: find })
  expect(await edict(pair, ["h", "nix", "eval", ".#lib.answer"])).toMatchObject({ code: 0 })
  const result = await edict(pair, ["h", ...script("rm -r many; touch /root/broken")])
  expect(result.code).toBe(254)
  expect(result.stderr).toContain("what the command changed is not known")
  expect(existsSync(pair.client.outside("/root/p/many/1/file1"))).toBeTrue()
  await pair.host.sh("rm broken")
})

const edictWords = (host: string): string[] => [EDICT, host, "nix", "eval", ".#lib.answer"]

test("no space there: nothing of it is put in its place", async () => {
  await using pair = await pairOf({ hide: ["rsync"], diskLimit: "30m" })
  expect(await edict(pair, ["h", "nix", "eval", ".#lib.answer"])).toMatchObject({ code: 0 })
  await pair.client.sh("head -c 40000000 /dev/urandom >p/big; echo 2 >p/version.txt")
  const result = await edict(pair, ["h", "nix", "eval", ".#lib.answer"])
  expect({ code: result.code, stdout: result.stdout }).toEqual({ code: 254, stdout: "" })
  expect(result.stderr).toMatch(/(No space left|Wrote only).*; try: free some space/)
  expect(readFileSync(there(pair, "version.txt"), "utf8")).toBe("1\n")
  await pair.client.sh("rm p/big")
  expect(await edict(pair, ["h", "nix", "eval", ".#lib.answer"])).toMatchObject({ code: 0 })
  expectSame(pair)
})

// ── Other shells as /bin/sh ───

const SHELLS: [name: string, program: string][] = [
  ["bash", "bash"],
  ["mksh", "mksh"],
  ["yash", "yash"],
  ["zsh", "zsh"],
]
describe("/bin/sh over there", () => {
  let pair: Machines
  beforeAll(async () => {
    pair = await pairOf({ bsd: true })
    expect(await edict(pair, ["h", "nix", "build", ".#hello"])).toMatchObject({ code: 0 })
    await pair.client.sh("cd p && git add -A && git commit -qm lock")
  })
  afterAll(async () => await pair?.[Symbol.asyncDispose]())

  test.each(SHELLS)("%s", async (name, program) => {
    await pair.host.sh(`ln -sf /run/lab/usr/bin/${program} /usr/bin/sh`)
    await pair.client.sh(
      `cd p; echo ${name} >hello2.txt; rm -f many/1/file1; seq 30000 >many/1/${name}; mkdir -p e/${name}`,
    )
    const work = `cat hello2.txt; echo there >"new
line"; rm many/1/${name}; mkdir -p made/${name}; echo "$1" >"made/${name}/ü"; ln -sf ../none "made/${name}/link"; exit 5`
    const result = await edict(pair, ["h", ...script(work, "a'b")])
    expect(result).toMatchObject({ code: 5, stdout: `${name}\n` })
    expect(readFileSync(pair.client.outside(`/root/p/made/${name}/ü`), "utf8")).toBe("a'b\n")
    expectSame(pair)
    // Nothing of edict is open in the command.
    const open = await edict(pair, ["h", ...script("exec /run/lab/usr/bin/ls -l /proc/self/fd")])
    expect(open.stdout).toContain(" 2 -> ")
    expect(open.stdout).not.toContain("edict")
    const running = await startBrood(pair)
    await running.kill("SIGINT")
    expect(await running.result).toMatchObject({ code: 130 })
    await expectNoBrood(pair)
    await pair.client.sh("cd p; git checkout -q .")
  })
})

// ── What a user is told ───

test("--doctor says what goes by tar, and that all works all the same", async () => {
  await using pair = await pairOf({ bsd: true }, { hide: ["rsync"] })
  const doctor = await edict(pair, ["--doctor", "h"])
  expect(doctor.code).toBe(0)
  expect(doctor.stdout).toMatch(/warning +no rsync here: files go up by tar\n +install rsync\n/)
  expect(doctor.stdout).toMatch(/warning +openrsync there: files go up by tar\n +ssh h /)
})
