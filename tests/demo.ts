/**
 * npm run demo: the examples of the README on two machines of the lab, with what they print. Every example is
 * checked; the exit code is 0 if all of them did what they should.
 */

import { existsSync, readFileSync } from "node:fs"
import { join } from "node:path"
import { SYSTEM, writeFiles } from "./lab/flake"
import { REPOSITORY, startClient, startHost, type Client, type Host } from "./lab/lab"
import { SOURCES } from "./sources"

const PROJECT = "/root/project"
const EDICT_DIRECTORY = join(REPOSITORY, "dist")

// ── The project ───

/** Needs nothing but /bin/sh to be built, as no network is used. */
const FLAKE = `{
  inputs.greetings.url = "git+file:///srv/greetings";   # only the host can reach it

  outputs = { self, greetings }:
    let
      system = "${SYSTEM}";
      build = name: file: script: derivation {
        inherit name file system;
        builder = "/bin/sh";
        args = [ "-euc" script ];
        PATH = "/usr/bin:/bin";
      };
      program = name: file: build name file ''
        mkdir -p "$out/bin"
        cp "$file" "$out/bin/\${name}"
        chmod +x "$out/bin/\${name}"
      '';
    in {
      packages.\${system} = {
        my-package = build "my-package" ./names.txt ''sed "s/^/\${greetings.word}, /" "$file" >"$out"'';
        my-integration-test = program "my-integration-test" ./integration-test.sh;
        bump-versions = program "bump-versions" ./bump-versions.sh;
      };
      checks.\${system}.my-package = self.packages.\${system}.my-package;
    };
}
`

const FILES = { "flake.nix": FLAKE, ...SOURCES }

/** Stands for nixpkgs: what the host's own registry knows by that name. */
const STUB = `{
  outputs = _: {
    packages.${SYSTEM}.hello = derivation {
      name = "hello";
      system = "${SYSTEM}";
      builder = "/bin/sh";
      args = [ "-c" ''mkdir -p "$out/bin"; printf '#!/bin/sh\\necho "Hello, world! I am on $(hostname)."\\n' >"$out/bin/hello"; chmod +x "$out/bin/hello"'' ];
      PATH = "/usr/bin:/bin";
    };
  };
}
`

const greetings = (word: string): Record<string, string> => ({
  "flake.nix": `{ outputs = _: { word = "${word}"; }; }\n`,
})

async function prepare(host: Host, client: Client): Promise<void> {
  writeFiles(host.outside("/srv/greetings"), greetings("Hello"))
  writeFiles(host.outside("/srv/nixpkgs"), { "flake.nix": STUB })
  await quietly(host, "git config --global user.email h@example.org && git config --global user.name h")
  await quietly(host, `cd /srv/greetings && git init -q && ${COMMIT}`)
  await quietly(host, "nix registry add nixpkgs path:/srv/nixpkgs")
  writeFiles(client.outside("/root"), { "private.txt": "stays on this machine\n" })
  writeFiles(client.outside(PROJECT), FILES)
  await quietly(
    client,
    `cd ${PROJECT} && git init -q && git add -A && edict -q root@h nix flake lock && ${COMMIT}`,
  )
  // What the lock file names is not the newest any more.
  writeFiles(host.outside("/srv/greetings"), greetings("Welcome"))
  await quietly(host, `cd /srv/greetings && ${COMMIT}`)
}

const COMMIT = "git add -A && git commit -q -m change"

async function quietly(machine: Host | Client, script: string): Promise<void> {
  const { code, stdout, stderr } = await machine.sh(script, { env: ENVIRONMENT })
  if (code !== 0) throw new Error(`demo: ${script}: exit code ${code}\n${stdout}${stderr}`)
}

const ENVIRONMENT = {
  PATH: `${EDICT_DIRECTORY}:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin`,
}

// ── The transcript ───

const colour = process.stdout.isTTY && !process.env.NO_COLOR
const bold = (text: string): string => (colour ? `\x1b[1m${text}\x1b[0m` : text)
const dim = (text: string): string => (colour ? `\x1b[2m${text}\x1b[0m` : text)

const problems: string[] = []

function check(holds: boolean, what: string): void {
  if (holds) return
  problems.push(what)
  console.log(`demo: FAILED: ${what}`)
}

/** What a command must do: its exit code (0 unless given), and what it must print, on either stream. */
type Expected = { code?: number; prints?: RegExp[]; in?: string }

/** Runs one line on the client as a person would, prints it with its output, and checks both; answers the output. */
async function show(client: Client, line: string, expected: Expected = {}): Promise<string> {
  const cwd = expected.in ?? PROJECT
  const { code, stdout } = await client.sh(`{ ${line}\n} 2>&1`, { cwd, env: ENVIRONMENT, timeout: 60_000 })
  console.log(`${dim(`${cwd.replace("/root", "~")} $`)} ${bold(line)}`)
  process.stdout.write(stdout === "" || stdout.endsWith("\n") ? stdout : `${stdout}\n`)
  if (code !== 0) console.log(dim(`[exit code ${code}]`))
  check(code === (expected.code ?? 0), `${line}: exit code ${code}, not ${expected.code ?? 0}`)
  for (const pattern of expected.prints ?? [])
    check(pattern.test(stdout), `${line}: does not print ${pattern}`)
  return stdout
}

const title = (text: string): void => console.log(`\n${bold(`# ${text}`)}`)

// ── The examples ───

async function examples(host: Host, client: Client): Promise<void> {
  const there = client.outside(PROJECT)
  const read = (name: string) =>
    existsSync(join(there, name)) ? readFileSync(join(there, name), "utf8") : ""

  title("A build: the result is here, with its closure, and safe from garbage collection")
  await show(client, "edict root@h nix build .#my-package", { prints: [/result -> \/nix\/store\//] })
  await show(client, "cat result", { prints: [/^Hello, Ada\nHello, Grace\n$/] })
  await show(client, "nix-store --query --roots result", { prints: [/\/root\/project\/result/] })

  title("Without a link nothing is copied")
  const json = await show(client, "edict root@h nix build .#my-integration-test --no-link --json", {
    prints: [/"out":"\/nix\/store\//],
  })
  const path = /"out":"([^"]*)"/.exec(json)?.[1] ?? ""
  check(existsSync(host.outside(path)) && !existsSync(client.outside(path)), "--no-link copied a result")

  title("Inputs are fetched over there; flake.lock changes here")
  const locked = read("flake.lock")
  await show(client, "edict root@h nix flake update .", { prints: [/flake\.lock/] })
  await show(client, "git commit -a -m 'update inputs'", { prints: [/1 file changed/] })
  check(locked !== "" && read("flake.lock") !== locked, "flake.lock did not change")

  title("Input, output and exit code of a program are as if it ran here")
  await show(client, "printf '%s\\n' a b c | edict root@h nix run .#my-integration-test", {
    code: 3,
    prints: [/^testing on h\na passed\nb failed\nc passed$/m],
  })

  title("Checks")
  await show(client, "edict root@h nix flake check .")

  title("Files that a program changes come home; `edict HOST FLAKEREF` is short for nix run")
  await show(client, "edict root@h .#bump-versions", { prints: [/2 files changed here/] })
  await show(client, "git status --short", { prints: [/^ M versions.txt$/m, /^\?\? changes.txt$/m] })
  check(read("versions.txt") === "curl 8.2\n", "versions.txt did not come home")
  check(read("changes.txt") === "curl 8.1 -> 8.2\n", "changes.txt did not come home")

  title("No local flake: nothing of the current directory travels, be it your home")
  await show(client, "edict root@h nix run nixpkgs#hello", {
    in: "/root",
    prints: [/^Hello, world! I am on h\.$/m],
  })
  const { stdout: found } = await host.sh("find /root /tmp -name private.txt")
  check(found === "", "a file of the home directory travelled")

  title("What would run")
  await show(client, "edict --dry-run root@h nix build .#my-package", { prints: [/rsync /, /nix build/] })

  title("A host that cannot be reached")
  await show(client, "edict root@nowhere nix build .#my-package", {
    code: 255,
    prints: [/^edict: cannot reach/m],
  })
}

async function main(): Promise<number> {
  console.log("demo: a client and a host, h, on this machine; nixpkgs is a stub, as no network is used")
  const host = await startHost({ name: "h", flakes: true })
  const client = await startClient({ hosts: [host] })
  const machines = [client, host]
  try {
    await prepare(host, client)
    await examples(host, client)
  } finally {
    await Promise.all(machines.map((machine) => machine.stop()))
  }
  for (const { name, pid, directory } of machines)
    check(!existsSync(directory) && !existsSync(`/proc/${pid}`), `something of ${name} is left`)
  if (problems.length > 0)
    console.log(`\ndemo: ${problems.length} of its checks FAILED:\n${problems.join("\n")}`)
  else console.log("\ndemo: every example did what it should; both machines are stopped and removed")
  return problems.length > 0 ? 1 : 0
}

process.exitCode = await main().catch((error: unknown) => {
  console.error(error instanceof Error ? error.message : error)
  return 1
})
