// What people get: the programs of build:all for every system, and edict.ts by itself.
import { afterAll, beforeAll, describe, expect, setDefaultTimeout, test } from "bun:test"
import {
  cpSync,
  existsSync,
  mkdirSync,
  mkdtempSync,
  readdirSync,
  readFileSync,
  rmSync,
  writeFileSync,
} from "node:fs"
import { homedir, tmpdir } from "node:os"
import { join } from "node:path"
import packageJson from "../package.json"
import { PACKAGES, USAGE } from "../edict"
import { SYSTEMS } from "./build-all"
import { GIT_INIT, writeFlake } from "./lab/flake"
import { REPOSITORY, startClient, startHost } from "./lab/lab"
import { npmRegistry, registryEnvironment } from "./registry"

setDefaultTimeout(180_000)
const registry = await npmRegistry()
if (registry.why) console.log(`ship.test.ts: what is fetched from npm is skipped, ${registry.why}`)
const VERSION_LINE = `edict ${packageJson.version}\n`
const PLAN = ["--dry-run", "h", "nix", "build", "nixpkgs#hello"]

const work = mkdtempSync(join(tmpdir(), "edict-ship-"))
afterAll(() => rmSync(work, { recursive: true }))

type Ran = { code: number; stdout: string; stderr: string }

/** Runs a program to its end, with the environment given and nothing else. */
async function run(
  argv: string[],
  options: { cwd?: string; env?: Record<string, string> } = {},
): Promise<Ran> {
  const { cwd = work, env = {} } = options
  const child = Bun.spawn(argv, {
    cwd,
    env: { PATH: process.env["PATH"] ?? "", HOME: work, ...env },
    stdin: "ignore",
    stdout: "pipe",
    stderr: "pipe",
  })
  const [stdout, stderr, code] = await Promise.all([child.stdout.text(), child.stderr.text(), child.exited])
  return { code, stdout, stderr }
}

/** A directory of its own for a test. */
function directory(name: string): string {
  const path = join(work, name)
  mkdirSync(path, { recursive: true })
  return path
}

// ── build:all ───

describe.skipIf(!registry.url)("bun run build:all", () => {
  const dist = join(work, "dist")
  let printed = ""
  beforeAll(async () => {
    const cache = process.env["XDG_CACHE_HOME"] || join(homedir(), ".cache")
    const env = { HOME: homedir(), XDG_CACHE_HOME: cache }
    const built = await run(["bun", "run", "--silent", "build:all", "--into", dist], { cwd: REPOSITORY, env })
    if (built.code !== 0) throw new Error(built.stdout + built.stderr)
    printed = built.stdout
  })

  const LOADERS: Record<string, string> = {
    "linux-x64": "x64 /lib64/ld-linux-x86-64.so.2",
    "linux-arm64": "arm64 /lib/ld-linux-aarch64.so.1",
    "linux-x64-musl": "x64 /lib/ld-musl-x86_64.so.1",
    "linux-arm64-musl": "arm64 /lib/ld-musl-aarch64.so.1",
    "darwin-x64": "x64 Mach-O",
    "darwin-arm64": "arm64 Mach-O",
  }
  const names = Object.keys(LOADERS)

  test("one program for each system, and no other", () => {
    expect(Object.keys(SYSTEMS)).toEqual(names)
    expect(readdirSync(dist).toSorted()).toEqual(
      ["SHA256SUMS", ...names.map((name) => `edict-${name}`)].toSorted(),
    )
  })

  test.each(names)("%s: the format of that system", (name) => {
    expect(formatOf(readFileSync(join(dist, `edict-${name}`)))).toBe(LOADERS[name]!)
  })

  test("its size is printed, and its checksum is right", async () => {
    for (const name of names)
      expect(printed).toMatch(new RegExp(`^\\S*/edict-${name} +\\d{2,3}\\.\\d MiB$`, "m"))
    const checked = await run(["sha256sum", "-c", "SHA256SUMS"], { cwd: dist })
    expect(checked).toEqual({
      code: 0,
      stderr: "",
      stdout: names.map((name) => `edict-${name}: OK\n`).join(""),
    })
  })

  // Where macOS checks signatures it kills a program whose pages do not hash to what its own signature says.
  test.each(["darwin-x64", "darwin-arm64"])("%s: an ad-hoc signature that covers all of it", (name) => {
    expect(signatureOf(readFileSync(join(dist, `edict-${name}`)))).toEqual({
      flags: "ad hoc, by a linker",
      end: "of the file",
      wrongPages: 0,
      firstUnsigned: "the signature",
    })
  })

  const ways = [
    ["linux-x64", process.arch === "x64" ? [] : ["qemu-x86_64-static", "-L", "/usr/x86_64-linux-gnu"]],
    ["linux-arm64", process.arch === "arm64" ? [] : ["qemu-aarch64-static", "-L", "/usr/aarch64-linux-gnu"]],
  ] as const
  describe.each(ways)("%s", (name, emulator) => {
    const missing = emulator.filter((word) => !word.startsWith("-") && !Bun.which(word) && !existsSync(word))
    if (missing.length > 0)
      console.log(`ship.test.ts: ${name} is not run here, there is no ${missing.join(", ")}`)
    const argv = [...emulator, join(dist, `edict-${name}`)]

    test.skipIf(missing.length > 0)("it runs", async () => {
      expect(await run([...argv, "--version"])).toEqual({ code: 0, stdout: VERSION_LINE, stderr: "" })
      expect(await run([...argv, "--help"])).toEqual({ code: 0, stdout: USAGE, stderr: "" })
      const plan = await run([...argv, ...PLAN])
      expect(plan).toMatchObject({ code: 0, stderr: "" })
      expect(plan.stdout).toMatch(/^ssh .* h 'cd .* && nix build '\\''nixpkgs#hello'\\'''$/m)
    })

    // Now and then qemu says of a program on PATH that it could not be started, which no kernel does.
    const retry = emulator.length > 0 ? 3 : 0
    const buildsThere = async () => {
      await using host = await startHost({ name: "h" })
      await using client = await startClient({ hosts: [host] })
      writeFlake(client.outside("/root/p"))
      await client.sh(GIT_INIT, { cwd: "/root/p" })
      cpSync(join(dist, `edict-${name}`), client.outside("/root/edict"))
      const build = [...emulator, "/root/edict", "h", "nix", "build", ".#hello"]
      const ran = await client.run(build, { cwd: "/root/p" })
      expect(ran).toMatchObject({ code: 0, stdout: "" })
      expect((await client.run(["cat", "/root/p/result"])).stdout).toContain("hello")
    }
    test.skipIf(missing.length > 0)("it builds on a host", buildsThere, { retry })
  })

  const musl = "/lib/ld-musl-x86_64.so.1"
  const absent = [musl, "/usr/bin/cc"].find((file) => !existsSync(file))
  if (absent) console.log(`ship.test.ts: linux-x64-musl is not run here, there is no ${absent}`)
  console.log(
    "ship.test.ts: linux-arm64-musl is not run, Debian has no libstdc++ for it; nor are those for macOS",
  )
  test.skipIf(absent !== undefined)("linux-x64-musl: it runs", async () => {
    const libraries = directory("musl")
    await muslLibraries(libraries)
    const argv = [musl, "--library-path", libraries, join(dist, "edict-linux-x64-musl")]
    expect(await run([...argv, "--version"])).toEqual({ code: 0, stdout: VERSION_LINE, stderr: "" })
    expect(await run([...argv, "--help"])).toEqual({ code: 0, stdout: USAGE, stderr: "" })
    expect(await run([...argv, ...PLAN])).toMatchObject({ code: 0, stderr: "" })
  })
})

test("a Bun that is not what the registry says is not built into anything", async () => {
  if (!Bun.which("npm")) return console.log("skipped: npm is not on PATH")
  const name = "bun-linux-aarch64"
  using server = Bun.serve({
    port: 0,
    hostname: "127.0.0.1",
    fetch: ({ url }) => {
      if (url.endsWith(".tgz")) return new Response("not what was published")
      const integrity = `sha512-${new Bun.CryptoHasher("sha512").update("what was published").digest("base64")}`
      const dist = { tarball: new URL("/x.tgz", url).href, integrity }
      const versions = { [Bun.version]: { name: `@oven/${name}`, version: Bun.version, dist } }
      return Response.json({ name: `@oven/${name}`, "dist-tags": { latest: Bun.version }, versions })
    },
  })
  const home = directory("integrity")
  const env = {
    HOME: home,
    XDG_CACHE_HOME: home,
    npm_config_registry: server.url.href,
    npm_config_fetch_retries: "0",
  }
  const argv = ["bun", "tests/build-all.ts", "--into", join(home, "dist"), "linux-arm64"]
  const built = await run(argv, { cwd: REPOSITORY, env })
  expect(built).toMatchObject({ code: 1, stdout: "", stderr: expect.stringContaining("EINTEGRITY") })
  expect(readdirSync(join(home, `edict-lab/bun-${Bun.version}`))).toEqual([])
  expect(readdirSync(join(home, "dist"))).toEqual([])
})

/** What a program is for: machine and loader of an ELF file, machine of a Mach-O file. */
function formatOf(file: Buffer): string {
  if (file.readUInt32LE(0) === 0xfeedfacf)
    return `${{ 0x1000007: "x64", 0x100000c: "arm64" }[file.readUInt32LE(4)]} Mach-O`
  expect(file.toString("latin1", 0, 6)).toBe("\x7fELF\x02\x01")
  const machine = { 62: "x64", 183: "arm64" }[file.readUInt16LE(18)]
  const [table, size, count] = [
    Number(file.readBigUInt64LE(32)),
    file.readUInt16LE(54),
    file.readUInt16LE(56),
  ]
  const headers = Array.from({ length: count }, (_, index) => file.subarray(table + index * size))
  const loader = headers.find((header) => header.readUInt32LE(0) === 3)! // PT_INTERP
  const start = Number(loader.readBigUInt64LE(8))
  return `${machine} ${file.toString("latin1", start, start + Number(loader.readBigUInt64LE(32)) - 1)}`
}

/** Checks the signature of a Mach-O file as macOS does: every page against its hash. */
function signatureOf(file: Buffer) {
  let command = 32
  while (file.readUInt32LE(command) !== 0x1d) command += file.readUInt32LE(command + 4) // LC_CODE_SIGNATURE
  const [start, size] = [file.readUInt32LE(command + 8), file.readUInt32LE(command + 12)]
  expect(file.readUInt32BE(start)).toBe(0xfade0cc0)
  const directory = file.subarray(start + file.readUInt32BE(start + 16))
  expect(directory.readUInt32BE(0)).toBe(0xfade0c02)
  const word = (offset: number) => directory.readUInt32BE(offset)
  const [flags, hashes, slots, limit] = [word(12), word(16), word(28), word(32)]
  const page = 2 ** directory[39]!
  const wrong = Array.from({ length: slots }, (_, slot) => {
    const code = file.subarray(slot * page, Math.min((slot + 1) * page, limit))
    const hash = new Bun.CryptoHasher("sha256").update(code).digest()
    return !hash.equals(directory.subarray(hashes + slot * 32, hashes + slot * 32 + 32))
  })
  return {
    flags: flags === 0x20002 ? "ad hoc, by a linker" : flags.toString(16),
    end: start + size === file.length ? "of the file" : start + size,
    wrongPages: wrong.filter(Boolean).length,
    firstUnsigned: limit === start && slots === Math.ceil(limit / page) ? "the signature" : limit,
  }
}

/** The libstdc++ of this machine for programs of musl: with the few functions that only glibc has. */
async function muslLibraries(target: string): Promise<void> {
  const shim = `
    #include <stddef.h>
    size_t strftime_l(char *, size_t, const char *, const void *, void *);
    size_t __strftime_l(char *s, size_t n, const char *f, const void *t, void *l) { return strftime_l(s, n, f, t, l); }
    int __cxa_thread_atexit_impl(void (*f)(void *), void *a, void *d) { return 0; }
    int _dl_find_object(void *address, void *result) { return -1; }
    int __cpu_indicator_init(void) { return 0; }
    unsigned arc4random(void) { return 4; }
    unsigned __cpu_model[4];
    char __libc_single_threaded;
  `
  writeFileSync(join(target, "shim.c"), shim)
  const flags = ["-shared", "-fPIC", "-nostdlib", "-fno-builtin", "-w"]
  const built = await run(["cc", ...flags, "-o", "ld-linux-x86-64.so.2", "shim.c"], { cwd: target })
  expect(built).toMatchObject({ code: 0 })
  cpSync("/lib/ld-musl-x86_64.so.1", join(target, "libc.musl-x86_64.so.1"), { dereference: true })
  for (const name of ["libstdc++.so.6", "libgcc_s.so.1"]) {
    const { stdout } = await run(["cc", `-print-file-name=${name}`])
    cpSync(stdout.trim(), join(target, name), { dereference: true })
  }
}

// ── edict.ts by itself ───

test("the versions that edict.ts names are those of bun.lock", () => {
  const lock = readFileSync(join(REPOSITORY, "bun.lock"), "utf8")
  const locked = (name: string) => new RegExp(`^    "${name}": \\["${name}@([^"]+)"`, "m").exec(lock)?.[1]
  expect(Object.keys(PACKAGES)).toEqual(Object.keys(packageJson.dependencies))
  expect(PACKAGES).toEqual(
    Object.fromEntries(Object.keys(PACKAGES).map((name) => [name, locked(name)])) as never,
  )
})

/** A new directory with edict.ts and nothing else, a new home, and `bun` there with that home and a registry. */
function alone(name: string, url: string) {
  const place = directory(`${name}/place`)
  const home = directory(`${name}/home`)
  cpSync(join(REPOSITORY, "edict.ts"), join(place, "edict.ts"))
  const start = (argv: string[]) =>
    run(argv, { cwd: place, env: { HOME: home, ...registryEnvironment(url) } })
  return { place, home, start, edict: (...args: string[]) => start(["bun", "edict.ts", ...args]) }
}

/** The packages in Bun's cache: name@version each. */
function installed(home: string): string[] {
  const cache = join(home, ".bun/install/cache")
  const names = readdirSync(cache).flatMap((name) =>
    name === "@iarna" ? readdirSync(join(cache, name)).map((inner) => `${name}/${inner}`) : [name],
  )
  return names.flatMap((name) => /^(.[^@]*@[^@]+)@@/.exec(name)?.[1] ?? []).toSorted()
}
const WANTED = Object.entries(PACKAGES).map(([name, version]) => `${name}@${version}`)

describe.skipIf(!registry.url)("edict.ts alone in a directory", () => {
  test("bun edict.ts runs, and installs what it imports", async () => {
    const { place, home, edict } = alone("alone", registry.url ?? "")
    expect(await edict("--version")).toEqual({ code: 0, stdout: VERSION_LINE, stderr: "" })
    expect(await edict("--help")).toEqual({ code: 0, stdout: USAGE, stderr: "" })
    expect(await edict(...PLAN)).toMatchObject({ code: 0, stderr: "" })
    writeFileSync(join(place, "hosts.toml"), 'default = "nowhere.invalid"\n')
    const unreachable = await edict("--config", "hosts.toml", "nix", "--version")
    expect(unreachable).toMatchObject({ code: 255, stderr: expect.stringContaining("cannot reach") })
    expect(installed(home)).toEqual(WANTED)
    expect(readdirSync(place).toSorted()).toEqual(["edict.ts", "hosts.toml"])

    // With that done it needs no network: the machines of the lab know no registry.
    await using host = await startHost({ name: "h" })
    await using client = await startClient({ hosts: [host] })
    writeFlake(client.outside("/root/p"))
    await client.sh(GIT_INIT, { cwd: "/root/p" })
    cpSync(place, client.outside("/root/alone"), { recursive: true })
    cpSync(join(home, ".bun"), client.outside("/root/.bun"), { recursive: true })
    const argv = ["bun", "/root/alone/edict.ts", "h", "nix", "build", ".#hello"]
    const ran = await client.run(argv, { cwd: "/root/p" })
    expect(ran).toMatchObject({ code: 0, stdout: "" })
    expect((await client.run(["cat", "/root/p/result"])).stdout).toContain("hello")
  })

  test("a newer version of a package, unlike the one it was tested with, changes nothing", async () => {
    using server = Bun.serve({
      port: 0,
      hostname: "127.0.0.1",
      fetch: async ({ url }) => {
        const { pathname } = new URL(url)
        if (pathname.endsWith(".tgz")) return new Response("of another kind", { status: 404 })
        const answer = await fetch(new URL(pathname.slice(1), registry.url), {
          headers: { accept: "application/json" },
        })
        const about = (await answer.json()) as { versions: Record<string, object>; "dist-tags": object }
        const dist = { tarball: new URL("/new.tgz", url).href }
        about.versions["99.0.0"] = { ...Object.values(about.versions).at(-1), version: "99.0.0", dist }
        return Response.json({ ...about, "dist-tags": { latest: "99.0.0" } })
      },
    })
    const { home, edict } = alone("newer", server.url.href)
    expect(await edict("-o", "ConnectTimeout=1", "nowhere.invalid", "nix", "--version")).toMatchObject({
      code: 255,
    })
    expect(installed(home)).toEqual(WANTED.filter((name) => !name.includes("toml")))
  })

  test("below a node_modules of somebody else ./edict.ts runs, and bun edict.ts says how", async () => {
    const { place, edict, start } = alone("below", registry.url ?? "")
    mkdirSync(join(place, "../node_modules/other"), { recursive: true })
    const told = await edict(...PLAN)
    expect(told).toMatchObject({ code: 254, stdout: "" })
    expect(told.stderr).toStartWith(`edict: Bun cannot fetch minimist@${PACKAGES.minimist}: `)
    const [, advice = ""] = /; try: (bun --install=fallback \S+),/.exec(told.stderr) ?? []
    expect(advice).toBe(`bun --install=fallback ${join(place, "edict.ts")}`)
    expect(await start([...advice.split(" "), ...PLAN])).toMatchObject({ code: 0, stderr: "" })
    expect(await start(["./edict.ts", ...PLAN])).toMatchObject({ code: 0, stderr: "" })
  })
})

test("without a registry edict.ts alone says what it lacks", async () => {
  const { edict } = alone("offline", "http://127.0.0.1:1/")
  const told = await edict(...PLAN)
  expect(told).toMatchObject({ code: 254, stdout: "" })
  expect(told.stderr).toMatch(/^edict: Bun cannot fetch minimist@.*; try: .*registry.*compiled edict\n$/)
})
