/** What the end-to-end tests share: the program as its users have it, and a project on two machines of the lab. */

import { existsSync, statSync } from "node:fs"
import { join } from "node:path"
import { GIT_INIT, writeFlake, type FlakeOptions } from "./lab/flake"
import {
  REPOSITORY,
  startClient,
  startHost,
  type Client,
  type ClientOptions,
  type Host,
  type HostOptions,
  type Result,
  type Running,
  type RunOptions,
} from "./lab/lab"

/** The compiled program, at the same path inside the client: dist/edict, or $EDICT_BIN (not below /root or /tmp). */
export const EDICT = compiled(process.env.EDICT_BIN)

/** The program as a script, for Bun: a command that runs in the client. */
export const SCRIPT = ["bun", "--no-env-file", "--config=/dev/null", join(REPOSITORY, "edict.ts")]

export type ProjectOptions = {
  /** Default: a plain host with the name `h`. */
  host?: Partial<HostOptions>
  client?: Partial<Omit<ClientOptions, "hosts">>
  /** How the flake of the project differs; false: the directory is empty. */
  flake?: FlakeOptions | false
  /** Whether the project is a git repository with all of it committed. Default: true. */
  git?: boolean
}

export type Project = {
  host: Host
  client: Client
  /** The directory of the project in the client. */
  dir: "/root/p"
  /** Where a path of the project is found from outside. */
  file(name: string): string
  /** Runs edict in the project to its end. Its standard input is closed unless there are bytes for it. */
  edict(args: string[], options?: RunOptions): Promise<Result>
  /** Starts edict in the project; for signals, conversations and terminals. */
  spawn(args: string[], options?: RunOptions & { tty?: boolean }): Running
  /** Runs a script of /bin/sh in the project; `edict` is a command in it. */
  sh(script: string, options?: RunOptions): Promise<Result>
  [Symbol.asyncDispose](): Promise<void>
}

/** Starts a host and a client with a flake in /root/p. Ends with an `await using` scope. */
export async function project(options: ProjectOptions = {}): Promise<Project> {
  const host = await startHost({ name: "h", ...options.host })
  const client = await startClient({ ...options.client, hosts: [host] })
  const dir = "/root/p"
  const inProject = (more: RunOptions = {}): RunOptions => ({ cwd: dir, ...more })
  const self: Project = {
    host,
    client,
    dir,
    file: (name) => client.outside(join(dir, name)),
    edict: (args, more) => client.run([EDICT, ...args], inProject(more)),
    spawn: (args, more) => client.spawn([EDICT, ...args], { cwd: dir, ...more }),
    sh: (script, more) => client.sh(`edict() { '${EDICT}' "$@"; }\n${script}`, inProject(more)),
    async [Symbol.asyncDispose]() {
      await Promise.all([client.stop(), host.stop()])
    },
  }
  const made = await client.sh(`mkdir ${dir}`)
  if (options.flake !== false) writeFlake(client.outside(dir), options.flake ?? {})
  const git = options.git === false ? made : await self.sh(options.flake === false ? "git init -q" : GIT_INIT)
  if (git.code !== 0) throw new Error(`the project could not be made: ${git.stderr}`)
  return self
}

function compiled(named: string | undefined): string {
  const file = named || join(REPOSITORY, "dist/edict")
  if (!existsSync(file)) throw new Error(`${file} does not exist: npm run build, or name one in EDICT_BIN`)
  const source = join(REPOSITORY, "edict.ts")
  if (statSync(file).mtimeMs < statSync(source).mtimeMs) console.warn(`${file} is older than edict.ts`)
  return file
}
