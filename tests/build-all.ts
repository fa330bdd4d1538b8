/**
 * bun run build:all: the program for every system, as dist/edict-SYSTEM, and dist/SHA256SUMS.
 *
 * usage: build-all.ts [--into DIR] [SYSTEM…]     (default: dist, all of them)
 *
 * Each is built by the command of "build" in package.json. The Bun inside comes from npm, from the registry that npm
 * is set up for: the same version as the one that builds. npm checks what it fetched; ~/.cache/edict-lab keeps it.
 */

import { existsSync } from "node:fs"
import { mkdir, mkdtemp, readdir, rename, rm } from "node:fs/promises"
import { homedir } from "node:os"
import { basename, join, resolve } from "node:path"
import { parseArgs } from "node:util"
import packageJson from "../package.json"

type System = Readonly<{
  /** What Bun's --target calls it. */
  target: string
  /** Package of npm, below @oven/, that has the Bun for it. */
  runtime: string
}>

/** Of x64 the builds that do without AVX2: the virtual machines of many servers have none, and edict no use for it. */
export const SYSTEMS: Readonly<Record<string, System>> = {
  "linux-x64": { target: "bun-linux-x64-baseline", runtime: "bun-linux-x64-baseline" },
  "linux-arm64": { target: "bun-linux-arm64", runtime: "bun-linux-aarch64" },
  "linux-x64-musl": { target: "bun-linux-x64-musl-baseline", runtime: "bun-linux-x64-musl-baseline" },
  "linux-arm64-musl": { target: "bun-linux-arm64-musl", runtime: "bun-linux-aarch64-musl" },
  "darwin-x64": { target: "bun-darwin-x64-baseline", runtime: "bun-darwin-x64-baseline" },
  "darwin-arm64": { target: "bun-darwin-arm64", runtime: "bun-darwin-aarch64" },
}

const PROJECT = resolve(import.meta.dir, "..")

async function main(): Promise<void> {
  const { values, positionals } = parseArgs({
    options: { into: { type: "string", default: join(PROJECT, "dist") } },
    allowPositionals: true,
  })
  const directory = resolve(values.into)
  const systems = (positionals.length > 0 ? positionals : Object.keys(SYSTEMS)).map((name) => {
    const system = SYSTEMS[name]
    if (!system) throw new Error(`${name} is none of: ${Object.keys(SYSTEMS).join(", ")}`)
    return { file: join(directory, `edict-${name}`), ...system }
  })
  await mkdir(directory, { recursive: true })
  const runtimes = await Promise.all(systems.map(({ runtime }) => fetchRuntime(runtime)))
  const sums: string[] = []
  for (const [index, { file, target }] of systems.entries()) {
    await build(file, target, runtimes[index]!)
    const { size } = Bun.file(file)
    sums.push(`${await sha256(file)}  ${basename(file)}\n`)
    console.log(`${file.padEnd(directory.length + 24)} ${(size / 2 ** 20).toFixed(1).padStart(6)} MiB`)
  }
  await Bun.write(join(directory, "SHA256SUMS"), sums.join(""))
}

/** Builds one file. A build for macOS whose signature would not hold gets one that does. */
async function build(file: string, target: string, runtime: string): Promise<void> {
  const [, ...words] = packageJson.scripts.build.split(" ")
  const flags = words.slice(0, words.indexOf("--outfile"))
  const where = [`--target=${target}`, `--compile-executable-path=${runtime}`, "--outfile", file]
  await run([process.execPath, ...flags, ...where], PROJECT)
  if (target === SYSTEMS["darwin-x64"]?.target)
    await Bun.write(file, signAdHoc(Buffer.from(await Bun.file(file).arrayBuffer()), "edict"))
}

/** Where the Bun of a package lies, after fetching it if need be. Throws if npm cannot have it, or finds it changed. */
async function fetchRuntime(name: string): Promise<string> {
  const cache = join(
    process.env["XDG_CACHE_HOME"] || join(homedir(), ".cache"),
    "edict-lab",
    `bun-${Bun.version}`,
  )
  const file = join(cache, name)
  if (existsSync(file)) return file
  await mkdir(cache, { recursive: true })
  const work = await mkdtemp(join(cache, ".fetch-"))
  try {
    // npm pack compares what it fetched with the checksum that the registry names.
    await run(
      ["npm", "pack", "--loglevel=error", "--pack-destination", work, `@oven/${name}@${Bun.version}`],
      work,
    )
    const [archive] = await readdir(work)
    await run(["tar", "-xzf", join(work, archive!), "-C", work, "package/bin/bun"], work)
    await rename(join(work, "package/bin/bun"), file)
  } finally {
    await rm(work, { recursive: true, force: true })
  }
  return file
}

async function run(argv: readonly string[], cwd: string): Promise<void> {
  const child = Bun.spawn([...argv], { cwd, stdin: "ignore", stdout: "pipe", stderr: "pipe" })
  const [out, errors, code] = await Promise.all([child.stdout.text(), child.stderr.text(), child.exited])
  if (code !== 0) throw new Error(`${argv.join(" ")}: exit code ${code}\n${out}${errors}`)
}

async function sha256(file: string): Promise<string> {
  const hasher = new Bun.CryptoHasher("sha256")
  for await (const chunk of Bun.file(file).stream()) hasher.update(chunk)
  return hasher.digest("hex")
}

// ── Signature of a program for macOS ───

const PAGE = 4096
const HASH = 32
const SEGMENT = 0x19 // LC_SEGMENT_64
const SIGNATURE = 0x1d // LC_CODE_SIGNATURE

/**
 * The program (Mach-O, 64 bit) with an ad-hoc signature instead of the one at its end, as macOS's own linker makes it.
 * Bun 1.4 signs so for arm64, where the system insists on it; for x64 it leaves the signature of Bun itself, which no
 * longer fits and whose hardened runtime may end the program for that. Layout: loader.h and cs_blobs.h of XNU.
 */
export function signAdHoc(program: Buffer, identifier: string): Buffer {
  const { [SIGNATURE]: command, linkedit, text } = loadCommands(program)
  if (command === undefined || linkedit === undefined || text === undefined)
    throw new Error("no program for macOS, or none with room for a signature")
  const limit = program.readUInt32LE(command + 8)
  const start = 20 // of the code directory, behind one entry of the index
  const hashes = start + 88 + Buffer.byteLength(identifier) + 1
  const length = hashes + Math.ceil(limit / PAGE) * HASH
  const signed = Buffer.alloc(limit + length)
  program.copy(signed, 0, 0, limit)

  signed.writeUInt32LE(length, command + 12)
  const size = BigInt(limit + length) - signed.readBigUInt64LE(linkedit + 40)
  const page = 0x4000n
  signed.writeBigUInt64LE(((size + page - 1n) / page) * page, linkedit + 32) // in memory
  signed.writeBigUInt64LE(size, linkedit + 48) // in the file

  const signature = signed.subarray(limit)
  writeWords(signature, 0, [0xfade0cc0, length, 1, 0, start])
  const directory = signature.subarray(start)
  const flags = 0x20002 // ad hoc, by a linker
  const slots = Math.ceil(limit / PAGE)
  writeWords(directory, 0, [0xfade0c02, length - start, 0x20400, flags, hashes - start, 88, 0, slots, limit])
  directory.set([HASH, 2 /* SHA-256 */, 0, Math.log2(PAGE)], 36)
  directory.writeBigUInt64BE(signed.readBigUInt64LE(text + 40), 64)
  directory.writeBigUInt64BE(signed.readBigUInt64LE(text + 48), 72)
  directory.writeBigUInt64BE(1n, 80) // a main program
  directory.write(identifier, 88)
  for (let slot = 0; slot < slots; slot++) {
    const code = signed.subarray(slot * PAGE, Math.min((slot + 1) * PAGE, limit))
    signature.set(new Bun.CryptoHasher("sha256").update(code).digest(), hashes + slot * HASH)
  }
  return signed
}

function loadCommands(program: Buffer): { [SIGNATURE]?: number; linkedit?: number; text?: number } {
  if (program.readUInt32LE(0) !== 0xfeedfacf) return {}
  const found: { [SIGNATURE]?: number; linkedit?: number; text?: number } = {}
  let at = 32
  for (let left = program.readUInt32LE(16); left > 0; left--) {
    const kind = program.readUInt32LE(at)
    const name = program.toString("latin1", at + 8, at + 24).replace(/\0.*/, "")
    if (kind === SIGNATURE) found[SIGNATURE] = at
    if (kind === SEGMENT && name === "__LINKEDIT") found.linkedit = at
    if (kind === SEGMENT && name === "__TEXT") found.text = at
    at += program.readUInt32LE(at + 4)
  }
  return found
}

function writeWords(buffer: Buffer, offset: number, words: readonly number[]): void {
  for (const [index, word] of words.entries()) buffer.writeUInt32BE(word, offset + index * 4)
}

if (import.meta.main)
  await main().catch((error: unknown) => {
    console.error(`build:all: ${error instanceof Error ? error.message : String(error)}`)
    process.exitCode = 1
  })
