// flake.nix, against a stub of nixpkgs: it evaluates for every system, and what it makes is built and used here.
import { afterAll, beforeAll, describe, expect, test } from "bun:test"
import { cpSync, mkdtempSync, readFileSync, rmSync, writeFileSync } from "node:fs"
import { tmpdir } from "node:os"
import { join } from "node:path"
import packageJson from "../package.json"
import { GIT_INIT, SYSTEM, writeFiles, writeFlake } from "./lab/flake"
import { nixAvailable, startClient, startHost, type Client, type Host } from "./lab/lab"
import { npmRegistry, registryEnvironment } from "./registry"

const project = join(import.meta.dir, "..")
const systems = ["aarch64-darwin", "aarch64-linux", "x86_64-darwin", "x86_64-linux"]
const nixIsHere = Bun.which("nix") !== null
if (!nixIsHere) console.log("flake.test.ts: skipped, nix is not on PATH")
const registry = await npmRegistry()
if (registry.why) console.log(`flake.test.ts: what Bun has to install for is skipped, ${registry.why}`)

const STUB = ["--no-write-lock-file", "--override-input", "nixpkgs", "path:./tests/stub-nixpkgs"]

/** A copy of what the flake reads: the checkout may have untracked files and a large node_modules. */
function copyFlake(directory: string): void {
  for (const name of ["flake.nix", "package.json", "bun.lock", "bunfig.toml", "edict.ts", "tests"])
    cpSync(join(project, name), join(directory, name), { recursive: true })
}

describe.skipIf(!nixIsHere)("flake.nix evaluates", () => {
  // No network, no build, a private store.
  let directory = ""
  beforeAll(() => {
    directory = mkdtempSync(join(tmpdir(), "edict-flake-"))
    copyFlake(join(directory, "flake"))
  })
  afterAll(() => {
    Bun.spawnSync(["chmod", "-R", "u+w", directory]) // store paths are read-only
    rmSync(directory, { recursive: true })
  })

  function nix(...words: string[]): string {
    const argv = [
      ...["nix", "--extra-experimental-features", "nix-command flakes", "--store", join(directory, "store")],
      ...["--option", "substituters", "", ...words, ...STUB],
    ]
    const env = { PATH: process.env.PATH, HOME: directory }
    const { exitCode, stdout, stderr } = Bun.spawnSync(argv, { cwd: join(directory, "flake"), env })
    if (exitCode !== 0) throw new Error(`${argv.join(" ")}: exit code ${exitCode}\n${stderr}`)
    return stdout.toString()
  }

  /** {system: {name: …}} of one output, each value passed through the Nix function `f`. */
  function evaluate(output: string, f: string): Record<string, Record<string, string>> {
    const apply = `builtins.mapAttrs (_: builtins.mapAttrs (_: ${f}))`
    return JSON.parse(nix("eval", "--json", `path:.#${output}`, "--apply", apply))
  }

  const derivations = [
    ["packages", ["default", "edict"]],
    ["devShells", ["default"]],
    ["checks", ["edict", "starts", "unit"]],
  ] as const
  test.each(derivations)("%s: derivations for all four systems", (output, names) => {
    const bySystem = evaluate(output, 'd: "${d.system} ${builtins.unsafeDiscardStringContext d.drvPath}"')
    expect(Object.keys(bySystem)).toEqual(systems)
    for (const [system, byName] of Object.entries(bySystem)) {
      expect(Object.keys(byName)).toEqual([...names])
      for (const drv of Object.values(byName))
        expect(drv).toMatch(new RegExp(`^${system} /.*/[a-z0-9]{32}-[\\w.-]+\\.drv$`))
    }
  })

  test("apps: the program is that of the package", () => {
    const programs = evaluate("apps", 'app: "${app.type} ${builtins.unsafeDiscardStringContext app.program}"')
    const outputs = evaluate("packages", "d: builtins.unsafeDiscardStringContext d.outPath")
    expect(Object.keys(programs)).toEqual(systems)
    for (const system of systems) {
      const app = `app ${outputs[system]?.default}/bin/edict`
      expect(programs[system]).toEqual({ default: app, edict: app })
    }
  })

  test("the wrapper puts its tools first, but ssh and nix of the user before its own", () => {
    const phase = evaluate("packages", "d: builtins.unsafeDiscardStringContext d.installPhase")
    const script = phase["x86_64-linux"]?.default ?? ""
    const tools = (flag: string) =>
      [...(script.match(`--${flag} PATH : (\\S+)`)?.[1] ?? "").matchAll(/-(\w+)\/bin/g)].map((m) => m[1])
    const shipped = [
      "bash",
      "coreutils",
      "findutils",
      "gawk",
      "git",
      "gnugrep",
      "gnused",
      "gnutar",
      "rsync",
      "zstd",
    ]
    expect(tools("prefix")).toEqual(shipped)
    expect(tools("suffix")).toEqual(["openssh", "nix"])
  })

  test("an edit of the README changes no package", () => {
    const before = evaluate("packages", "d: d.drvPath")
    writeFileSync(join(directory, "flake/README.md"), "edited\n")
    expect(evaluate("packages", "d: d.drvPath")).toEqual(before)
    writeFileSync(join(directory, "flake/edict.ts"), "edited\n")
    expect(evaluate("packages", "d: d.drvPath")).not.toEqual(before)
  })

  test("nix flake show and nix flake check accept it", () => {
    const shown = JSON.parse(nix("flake", "show", "--json", "path:."))
    const outputs = ["apps", "checks", "devShells", "homeModules", "nixosModules", "overlays", "packages"]
    expect(Object.keys(shown).toSorted()).toEqual(outputs)
    nix("flake", "check", "--no-build", "path:.")
  })
})

test("the newest Nix accepts it", async () => {
  const available = await nixAvailable("2.34")
  if (available !== true) return console.log(`skipped: ${available}`)
  await using client = await startClient({ hosts: [], nix: "2.34", flakes: true })
  copyFlake(client.outside("/root/flake"))
  const argv = ["nix", "flake", "check", "--no-build", "--all-systems", "path:.", ...STUB]
  const { code, stderr } = await client.run(argv, { cwd: "/root/flake" })
  expect({ code, complaints: stderr.match(/^(error|warning: (?!not writing)).*/gm) ?? [] }).toEqual({
    code: 0,
    complaints: [],
  })
})

test.skipIf(!nixIsHere || !registry.url)(
  "bun run update-hash: the hash in flake.nix is that of bun.lock",
  () => {
    const directory = mkdtempSync(join(tmpdir(), "edict-hash-"))
    const flake = join(directory, "flake.nix")
    try {
      copyFlake(directory)
      const original = readFileSync(flake, "utf8")
      writeFileSync(flake, original.replace(/outputHash = "[^"]*"/, 'outputHash = "sha256-wrong="'))
      const runs = [1, 2].map(() => Bun.spawnSync(["bun", "run", "update-hash"], { cwd: directory }))
      expect(runs.map(({ exitCode }) => exitCode)).toEqual([0, 0])
      expect(readFileSync(flake, "utf8")).toBe(original)
      expect(runs.map(({ stdout }) => stdout.toString())).toEqual([
        expect.stringContaining("new hash"),
        expect.stringContaining("up to date"),
      ])
    } finally {
      rmSync(directory, { recursive: true })
    }
  },
)

/** A flake that uses edict's, as that of a user of home-manager or NixOS. */
const USER_FLAKE = `{
  inputs.nixpkgs.url = "path:/root/flake/tests/stub-nixpkgs";
  inputs.edict = { url = "path:/root/flake"; inputs.nixpkgs.follows = "nixpkgs"; };

  outputs = { nixpkgs, edict, ... }:
    let
      pkgs = nixpkgs.legacyPackages.${SYSTEM};
      apply = module: more: nixpkgs.lib.applyModule module {
        inherit pkgs;
        settings.programs.edict = { enable = true; } // more;
      };
      settings = {
        default = "of-the-module";
        machines = "/no/such/machines";
        hosts.of-the-module = { address = "root@h"; speed = 2.5; tags = [ "ci" ]; env.A = "b\\"c"; };
      };
      home = apply edict.homeModules.default { inherit settings; };
      nixos = apply edict.nixosModules.default { inherit settings; };
      wrong = apply edict.homeModules.default { settings.hosts.h.adress = "root@h"; };
    in
    {
      packages.${SYSTEM} = {
        overlaid = (pkgs.extend edict.overlays.default).edict;
        home-package = builtins.head home.home.packages;
        home-file = home.xdg.configFile."edict/config.toml".source;
        nixos-package = builtins.head nixos.environment.systemPackages;
        nixos-file = nixos.environment.etc."edict/config.toml".source;
        wrong-file = wrong.xdg.configFile."edict/config.toml".source;
      };
      without = {
        settings = apply edict.homeModules.default { };
        enable = apply edict.nixosModules.default { enable = false; };
      };
    };
}
`

describe.skipIf(!nixIsHere || !registry.url)("flake.nix builds", () => {
  let host: Host
  let client: Client
  const edict = "/root/edict/bin/edict"

  beforeAll(async () => {
    host = await startHost({ name: "h" })
    client = await startClient({ hosts: [host], flakes: true })
    await client.sh("sed -i 's/^hosts:.*/hosts: files dns/' /etc/nsswitch.conf") // for the registry
    copyFlake(client.outside("/root/flake"))
    writeFiles(client.outside("/root/user"), { "flake.nix": USER_FLAKE })
    await nix("build", "path:.#edict", "--out-link", "/root/edict", ...STUB)
  })
  afterAll(async () => {
    await Promise.all([client?.stop(), host?.stop()])
  })

  /** Nix in the directory of the flake; answers what it prints, or throws. */
  async function nix(...words: string[]): Promise<string> {
    const env = registryEnvironment(registry.url ?? "")
    const result = await client.run(["nix", ...words], { cwd: "/root/flake", env })
    if (result.code !== 0)
      throw new Error(`nix ${words.join(" ")}: exit code ${result.code}\n${result.stderr}`)
    return result.stdout.trim()
  }

  /** Builds outputs of the user's flake; answers their store paths. */
  async function build(...names: string[]): Promise<string[]> {
    const flags = ["--no-link", "--json", "--no-write-lock-file"]
    const built = await nix("build", ...flags, ...names.map((name) => `path:/root/user#${name}`))
    return (JSON.parse(built) as { outputs: { out: string } }[]).map(({ outputs }) => outputs.out)
  }

  test("the program, with a man page and completions for each shell", async () => {
    expect((await client.run([edict, "--version"])).stdout).toBe(`edict ${packageJson.version}\n`)
    expect((await client.run(["cat", "/root/edict/share/man/man1/edict.1"])).stdout).toMatch(
      /^\.TH "?EDICT"? /m,
    )
    const files = {
      bash: "bash-completion/completions/edict.bash",
      zsh: "zsh/site-functions/_edict",
      fish: "fish/vendor_completions.d/edict.fish",
    }
    for (const [shell, file] of Object.entries(files)) {
      const { stdout } = await client.run([edict, "--completion", shell])
      expect(stdout).toContain("edict")
      expect((await client.run(["cat", `/root/edict/share/${file}`])).stdout).toBe(stdout)
    }
  })

  test("with nothing on PATH it finds all that it needs", async () => {
    writeFlake(client.outside("/root/p"))
    await client.sh(GIT_INIT, { cwd: "/root/p" })
    const run = await client.run(["/usr/bin/env", "PATH=/nowhere", edict, "h", "nix", "build", ".#hello"], {
      cwd: "/root/p",
    })
    expect({ code: run.code, stderr: run.stderr }).toMatchObject({ code: 0 })
    expect((await client.run(["cat", "/root/p/result"])).stdout).toContain("hello")
  })

  test("an ssh of the user wins over that of the package", async () => {
    await client.sh(`mkdir -p /root/own && printf '#!/bin/sh\\ntouch /root/own/ran\\nexec /usr/bin/ssh "$@"\\n' >/root/own/ssh
      chmod +x /root/own/ssh`)
    const run = await client.sh(`PATH=/root/own:$PATH exec ${edict} h nix --version`)
    expect(run).toMatchObject({ code: 0, stdout: expect.stringContaining("nix (Nix)") })
    expect((await client.sh("ls /root/own")).stdout).toBe("ran\nssh\n")
  })

  test("checks: the program starts, and its unit tests pass", async () => {
    await nix(
      ...["build", "--no-link", `path:.#checks.${SYSTEM}.starts`, `path:.#checks.${SYSTEM}.unit`],
      ...STUB,
    )
  })

  test("overlay and modules have the same package", async () => {
    const paths = await build("overlaid", "home-package", "nixos-package")
    expect(new Set(paths)).toEqual(new Set([(await client.run(["readlink", "/root/edict"])).stdout.trim()]))
  })

  test("modules: the hosts file for one user, and for users of the machine who have none", async () => {
    const [home, nixos] = await build("home-file", "nixos-file")
    expect(Bun.TOML.parse((await client.run(["cat", home!])).stdout)).toEqual({
      default: "of-the-module",
      machines: "/no/such/machines",
      hosts: {
        "of-the-module": { address: "root@h", speed: 2.5, tags: ["ci"], env: { A: 'b"c' } },
      },
    })
    expect(nixos).toBe(home!)
    const plan = async (script: string) => (await client.sh(`${script}\n${edict} -n nix --version`)).stdout
    const machines = `mkdir -p /no/such && : >/no/such/machines`
    const system = await plan(`${machines}; mkdir -p /etc/edict && ln -s ${nixos} /etc/edict/config.toml`)
    expect(system).toContain("root@h")
    const own = await plan(`mkdir -p .config/edict && echo 'default = "my-own"' >.config/edict/config.toml`)
    expect(own).toContain("my-own")
    expect(own).not.toContain("root@h")
    await client.sh("rm -r .config/edict /etc/edict /no")
  })

  test("modules: a wrong setting fails while it is built, with edict's own words", async () => {
    const failure = await build("wrong-file").catch(String)
    expect(failure).toMatch(/unknown key "?hosts\.h\.adress"?; allowed: .*address/)
  })

  test("modules: nothing without enable, and no hosts file without settings", async () => {
    const names = "builtins.mapAttrs (_: builtins.attrNames)"
    const evaluate = async (what: string, f: string) =>
      JSON.parse(
        await nix("eval", "--no-write-lock-file", "--json", `path:/root/user#without.${what}`, "--apply", f),
      )
    expect(await evaluate("enable", "builtins.attrNames")).toEqual([])
    expect(await evaluate("settings.xdg.configFile", names)).toEqual({ "edict/config.toml": [] })
  })
})
