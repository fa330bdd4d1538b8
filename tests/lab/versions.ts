/** The versions of Nix, rsync and OpenSSH that a machine of the lab can have. */

import { existsSync } from "node:fs"
import { homedir } from "node:os"
import { join } from "node:path"

export type NixVersion = "2.8" | "2.26" | "2.34"
export type RsyncVersion = "3.2" | "3.5"
export type SshVersion = "9.2" | "10"

/** Where a version comes from: the Debian suite, "" for what is installed here. */
type Source = { suite: string; packages: string; programs: string[] }

const nix = (suite: string): Source => ({ suite, packages: "nix-bin", programs: ["usr/bin/nix*"] })
const rsync = (suite: string): Source => ({ suite, packages: "rsync", programs: ["usr/bin/rsync"] })
const openssh = (suite: string): Source => ({
  suite,
  packages: "openssh-server openssh-client",
  programs: ["usr/bin/ssh", "usr/sbin/sshd", "usr/lib/openssh/sshd-*"],
})

const SOURCES = {
  nix: { "2.8": nix(""), "2.26": nix("trixie"), "2.34": nix("sid") },
  rsync: { "3.2": rsync("bookworm"), "3.5": rsync("sid") },
  openssh: { "9.2": openssh(""), "10": openssh("trixie") },
} satisfies Record<string, Record<string, Source>>

export type Program = keyof typeof SOURCES

const unpacked = new Map<string, Promise<string>>()

/** Where a version is unpacked, after fetching it if need be; "" for the one installed here. */
export function versionDirectory(program: Program, version: string): Promise<string> {
  const name = `${program}-${version}`
  const known = unpacked.get(name) ?? unpack(program, version)
  unpacked.set(name, known)
  return known
}

/** true, or why a version cannot be had: for tests that are skipped then. */
export async function versionAvailable(program: Program, version: string): Promise<true | string> {
  return versionDirectory(program, version).then(
    () => true as const,
    (error: unknown) => (error instanceof Error ? error.message : String(error)),
  )
}

/** The same for Nix. */
export const nixAvailable = (version: NixVersion): Promise<true | string> => versionAvailable("nix", version)

async function unpack(program: Program, version: string): Promise<string> {
  const sources: Record<string, Source> = SOURCES[program]
  const source = sources[version]
  if (source === undefined) throw new Error(`lab: no ${program} ${version} is known`)
  const { suite, packages, programs } = source
  if (suite === "") return ""
  const cache = process.env["XDG_CACHE_HOME"] || join(homedir(), ".cache")
  const directory = join(cache, "edict-lab", `${program}-${version}`)
  if (existsSync(join(directory, "bin"))) return directory
  const script = join(import.meta.dir, "debian.sh")
  const words = [suite, version, directory, `/run/lab/${program}`, packages, ...programs]
  const child = Bun.spawn(["sh", script, ...words], { stdout: "ignore", stderr: "pipe" })
  const [reason, code] = await Promise.all([child.stderr.text(), child.exited])
  if (code !== 0) throw new Error(`${program} ${version} is not available: ${reason.trim()}`)
  return directory
}
