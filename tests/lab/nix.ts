/** The versions of Nix that a machine of the lab can have. */

import { existsSync } from "node:fs"
import { homedir } from "node:os"
import { join } from "node:path"

export type NixVersion = "2.8" | "2.26" | "2.34"

/** The Debian suite that has it; 2.8 is the one installed here. */
const SUITES: Record<NixVersion, string> = { "2.8": "", "2.26": "trixie", "2.34": "sid" }

const unpacked = new Map<NixVersion, Promise<string>>()

/** Where a version is unpacked, after fetching it if need be; "" for the one installed here. */
export function nixDirectory(version: NixVersion): Promise<string> {
  const known = unpacked.get(version) ?? unpack(version)
  unpacked.set(version, known)
  return known
}

/** true, or why a version cannot be had: for tests that are skipped then. */
export async function nixAvailable(version: NixVersion): Promise<true | string> {
  return nixDirectory(version).then(
    () => true as const,
    (error: unknown) => (error instanceof Error ? error.message : String(error)),
  )
}

async function unpack(version: NixVersion): Promise<string> {
  if (version === "2.8") return ""
  const directory = join(
    process.env["XDG_CACHE_HOME"] || join(homedir(), ".cache"),
    "edict-lab",
    `nix-${version}`,
  )
  if (existsSync(join(directory, "bin/nix"))) return directory
  const script = join(import.meta.dir, "nix.sh")
  const child = Bun.spawn(["sh", script, version, SUITES[version], directory], {
    stdout: "ignore",
    stderr: "pipe",
  })
  const [reason, code] = await Promise.all([child.stderr.text(), child.exited])
  if (code !== 0) throw new Error(`Nix ${version} is not available: ${reason.trim()}`)
  return directory
}
