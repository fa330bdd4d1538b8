// The host config: what it may say, what its errors say, and where it is read from.
import { afterAll, beforeAll, describe, expect, test } from "bun:test"
import { mkdirSync, mkdtempSync, realpathSync, rmSync, writeFileSync } from "node:fs"
import { tmpdir } from "node:os"
import { join } from "node:path"
import {
  chooseHosts,
  EdictError,
  parseArguments,
  parseConfig,
  UsageError,
  type Host,
  type HostConfig,
} from "../edict.ts"
import { EDICT } from "./support"

const FILE = "/etc/some/config.toml"

const FULL = `
default = "big"
machines = "/etc/nix/machines"
[hosts.big]
address = "ssh://builder@big.example.com:2222"
systems = ["x86_64-linux", "i686-linux"]
features = ["kvm", "big-parallel"]
speed = 4.0
tags = ["ci"]
ssh-options = ["-J", "jump", "-i", "~/.ssh/builder"]
directory = "~/trees/edict/"
forward-agent = true
env = { FOO = "bar", _x1 = "" }
require-signatures = true
import = "sudo"
compress = true
substitute = true
send-inputs = true
[hosts.small]
[hosts."odd name.example"]
speed = 1
`

/** The host that a command line means with a config. */
async function hostOf(toml: string, argv: string[], env: Record<string, string> = {}): Promise<Host> {
  const config = await parseConfig(toml, FILE)
  const hosts = chooseHosts(config, await parseArguments([...argv, "nix", "build"], env), {
    HOME: "/home/ed",
    ...env,
  })
  expect(hosts).toHaveLength(1)
  return hosts[0]!
}

/** The EdictError that something ends with. */
async function errorOf(work: () => Promise<unknown>): Promise<EdictError> {
  try {
    await work()
  } catch (error) {
    if (error instanceof EdictError) return error
    throw error
  }
  throw new Error("no error")
}

describe("TOML becomes a Config", () => {
  test("with every key", async () => {
    expect(await parseConfig(FULL, FILE)).toEqual({
      file: FILE,
      default: "big",
      machines: "/etc/nix/machines",
      hosts: {
        big: {
          address: "ssh://builder@big.example.com:2222",
          systems: ["x86_64-linux", "i686-linux"],
          features: ["kvm", "big-parallel"],
          mandatoryFeatures: [],
          speed: 4,
          tags: ["ci"],
          sshOptions: ["-J", "jump", "-i", "~/.ssh/builder"],
          directory: "~/trees/edict/",
          forwardAgent: true,
          env: { FOO: "bar", _x1: "" },
          requireSignatures: true,
          import: "sudo",
          compress: true,
          substitute: true,
          sendInputs: true,
        },
        small: EMPTY_HOST,
        "odd name.example": EMPTY_HOST,
      },
    })
  })

  const EMPTY_HOST: HostConfig = {
    address: undefined,
    systems: [],
    features: [],
    mandatoryFeatures: [],
    speed: 1,
    tags: [],
    sshOptions: [],
    directory: undefined,
    forwardAgent: false,
    env: {},
    requireSignatures: false,
    import: undefined,
    compress: "auto",
    substitute: false,
    sendInputs: false,
  }

  test("nothing is a config too", async () => {
    expect(await parseConfig("", FILE)).toEqual({
      file: FILE,
      default: undefined,
      machines: undefined,
      hosts: {},
    })
    expect(await parseConfig("# empty\n[hosts]\n", FILE)).toMatchObject({ hosts: {} })
  })

  const wrong: [toml: string, key: string, allowed: string][] = [
    ["defualt = 'x'", "unknown key defualt", "allowed: default, machines, hosts; try: write default"],
    ["xyzzy = 1", "unknown key xyzzy", "allowed: default, machines, hosts"],
    ["default = 1", "default must be", "a string, not 1"],
    ["default = ''", "default must be", 'a string, not ""'],
    ["default = ['a']", "default must be", 'a string, not ["a"]'],
    ["machines = true", "machines must be", "a string, not true"],
    ["hosts = 1", "hosts must be", "a table, not 1"],
    ["hosts = ['a']", "hosts must be", 'a table, not ["a"]'],
    ["hosts = 2020-01-01", "hosts must be", "a table, not"],
    ["[hosts]\nbig = 'x'", "hosts.big must be", "a table; try: [hosts.big]"],
    ["[hosts.big]\nadress = 'x'", "unknown key hosts.big.adress", "; try: write hosts.big.address"],
    ["[hosts.big]\nport = 22", "unknown key hosts.big.port", "allowed: address, systems, features"],
    ["[hosts.big]\nconstructor = 1", "unknown key hosts.big.constructor", "allowed: address"],
    ["[hosts.big]\naddress = 1", "hosts.big.address must be", "a string, not 1"],
    ["[hosts.big]\nsystems = 'x86_64-linux'", "hosts.big.systems must be", "a list of strings"],
    ["[hosts.big]\nsystems = [1]", "hosts.big.systems must be", "a list of strings, not [1]"],
    ["[hosts.big]\nfeatures = {}", "hosts.big.features must be", "a list of strings"],
    ["[hosts.big]\nspeed = '4'", "hosts.big.speed must be", 'a number above 0, not "4"'],
    ["[hosts.big]\nspeed = 0", "hosts.big.speed must be", "a number above 0, not 0"],
    ["[hosts.big]\nspeed = -1.5", "hosts.big.speed must be", "a number above 0, not -1.5"],
    ["[hosts.big]\nspeed = nan", "hosts.big.speed must be", "a number above 0"],
    ["[hosts.big]\ntags = 'ci'", "hosts.big.tags must be", "a list of strings"],
    ["[hosts.big]\nssh-options = '-J jump'", "hosts.big.ssh-options must be", "a list of strings"],
    ["[hosts.big]\nforward-agent = 'yes'", "hosts.big.forward-agent must be", "true or false"],
    ["[hosts.big]\nrequire-signatures = 1", "hosts.big.require-signatures must be", "true or false, not 1"],
    ["[hosts.big]\nenv = ['A=1']", "hosts.big.env must be", "a table of strings"],
    ["[hosts.big]\nenv = { A = 1 }", "hosts.big.env must be", "a table of strings"],
    ["[hosts.big]\nenv = { 'A B' = '1' }", "hosts.big.env must be", "a table of strings"],
    ["[hosts.big]\ndirectory = 'a b'", "hosts.big.directory must be", "a path of letters, digits"],
    ["[hosts.big]\ndirectory = '~x/a'", "hosts.big.directory must be", "a path of letters, digits"],
    ["[hosts.big]\ndirectory = '$HOME'", "hosts.big.directory must be", "a path of letters, digits"],
    ["[hosts.big]\ndirectory = '../a'", "hosts.big.directory must be", "a path of letters, digits"],
    ["[hosts.big]\ndirectory = 'a/../../b'", "hosts.big.directory must be", "a path of letters, digits"],
    ["[hosts.big]\ndirectory = ''", "hosts.big.directory must be", "a path of letters, digits"],
    ["[hosts.big]\ndirectory = '/'", "hosts.big.directory must be", "a path of letters, digits"],
    ["[hosts.big]\ndirectory = '~/'", "hosts.big.directory must be", "a path of letters, digits"],
    ["[hosts.big]\ndirectory = '-x'", "hosts.big.directory must be", "a path of letters, digits"],
    ["[hosts.big]\ndirectory = '.'", "hosts.big.directory must be", "a path of letters, digits"],
    ["[hosts.big]\nimport = 'doas'", "hosts.big.import must be", '"sudo", not "doas"'],
    ["[hosts.big]\ncompress = 'yes'", "hosts.big.compress must be", 'true, false or "auto", not "yes"'],
    ["[hosts.big]\nsubstitute = 1", "hosts.big.substitute must be", "true or false, not 1"],
    ["[hosts.big]\nsend-inputs = 'all'", "hosts.big.send-inputs must be", 'true or false, not "all"'],
    ["default =", "not TOML", ""],
    ["[hosts.big\n", "not TOML", ""],
    ["default = 'a'\ndefault = 'b'", "not TOML", ""],
    ['"a\\u001b[31m" = 1', "unknown key a\\x1b[31m", "allowed: default"],
    ['[hosts."b\\u001b"]\nx = 1', "unknown key hosts.b\\x1b.x", "allowed: address"],
    ['[hosts]\n"b\\u001b" = 1', "hosts.b\\x1b must be", "a table"],
  ]
  test.each(wrong)("%j: %s %s", async (toml, key, allowed) => {
    const { message, hint, exitCode } = await errorOf(() => parseConfig(toml, FILE))
    const line = hint ? `${message}; try: ${hint}` : message
    expect(line).toStartWith(`${FILE}: ${key}`)
    expect(line).toContain(allowed)
    expect(line).not.toMatch(/[\n\u001b]/)
    expect(exitCode).toBe(254)
  })
})

describe("the host that is meant", () => {
  test("has what its table says", async () => {
    expect(await hostOf(FULL, ["big"])).toMatchObject({
      name: "big",
      destination: "builder@big.example.com",
      sshOptions: ["-p", "2222", "-J", "jump", "-i", "/home/ed/.ssh/builder", "-A"],
      directory: "trees/edict",
      env: { FOO: "bar", _x1: "" },
      requireSignatures: true,
      systems: ["x86_64-linux", "i686-linux"],
      features: ["kvm", "big-parallel"],
      speed: 4,
      tags: ["ci"],
    })
  })

  test("has no option of ssh that nobody gave: no port 22", async () => {
    expect(await hostOf(FULL, ["small"])).toMatchObject({
      destination: "small",
      sshOptions: [],
      directory: ".cache/edict",
    })
    expect(await hostOf("", ["ed@other"])).toMatchObject({ destination: "ed@other", sshOptions: [], env: {} })
  })

  test("options of the command line come first: ssh takes the first of two", async () => {
    const { sshOptions } = await hostOf(FULL, ["-p", "99", "big"])
    expect(sshOptions.slice(0, 4)).toEqual(["-p", "99", "-p", "2222"])
  })

  test("is the default where none is given; a name of the config or any other", async () => {
    expect((await hostOf("default = 'small'\n[hosts.small]\naddress = 'a@b'", [])).destination).toBe("a@b")
    expect((await hostOf("default = 'ed@elsewhere'", [])).destination).toBe("ed@elsewhere")
    expect((await hostOf("default = 'x'", [], { EDICT_HOST: "y" })).name).toBe("y")
    expect((await hostOf("default = 'x'", ["z"], { EDICT_HOST: "y" })).name).toBe("z")
  })

  test.each(["constructor", "__proto__", "toString"])(
    "may be called %s without having a table",
    async (name) => {
      expect(await hostOf("", [name])).toMatchObject({ destination: name, sshOptions: [] })
    },
  )

  test("is refused before anything runs if its address is none", async () => {
    expect((await errorOf(() => hostOf("[hosts.big]\naddress = '-oProxyCommand=x'", ["big"]))).exitCode).toBe(
      254,
    )
    expect((await errorOf(() => hostOf("default = '-x'", []))).message).toContain("starts with -")
  })

  test("nobody: says what to type", async () => {
    const error = await errorOf(() => hostOf("", []))
    expect(error).toBeInstanceOf(UsageError)
    expect(error.message).toContain("no host given")
    expect(error.hint).toContain("edict HOST nix build")
    expect(error.hint).toContain(FILE)
    const odd = parseArguments(["nix", "eval", "--expr", "a\nb \u001b[31m"], {})
    const line = await errorOf(async () => chooseHosts(await parseConfig("", FILE), await odd, {}))
    expect(line.hint).toContain("edict HOST nix eval --expr 'a\\x0ab \\x1b[31m'")
  })
})

describe("where the config is read from", () => {
  let home: string, project: string

  beforeAll(() => {
    home = realpathSync(mkdtempSync(join(tmpdir(), "edict-config-")))
    project = join(home, "project")
    const write = (name: string, text: string) => {
      mkdirSync(join(home, name, ".."), { recursive: true })
      writeFileSync(join(home, name), text)
    }
    write(".config/edict/config.toml", 'default = "of-home"\n')
    write("xdg/edict/config.toml", 'default = "of-xdg"\n')
    write("named.toml", 'default = "of-option"\n')
    write("variable.toml", 'default = "of-variable"\n')
    // What a cloned repository might bring.
    for (const name of [
      "config.toml",
      "edict.toml",
      ".edict.toml",
      "edict/config.toml",
      ".config/edict/config.toml",
    ])
      write(`project/${name}`, 'default = "of-project"\n')
    write("project/.env", "EDICT_HOST=of-dotenv\nEDICT_CONFIG=config.toml\nXDG_CONFIG_HOME=.config\n")
    write("project/.env.local", "EDICT_HOST=of-dotenv\n")
    write("project/bunfig.toml", 'preload = ["./preload.ts"]\n')
    write("project/preload.ts", 'console.log("preloaded"); process.env.EDICT_HOST = "of-preload"\n')
    write("project/package.json", '{ "type": "module" }\n')
    write("project/tsconfig.json", '{ "compilerOptions": { "jsxImportSource": "./preload" } }\n')
  })

  afterAll(() => rmSync(home, { recursive: true }))

  /** The host that the compiled program chooses in the project, or what it says on stderr. */
  const chosen = (argv: string[], env: Record<string, string> = {}): string => {
    const { stdout, stderr } = Bun.spawnSync(
      [EDICT, "--dry-run", "--json", ...argv, "nix", "build", "nixpkgs#x"],
      {
        cwd: project,
        env: { PATH: process.env.PATH ?? "", HOME: home, ...env },
        stdin: "ignore",
      },
    )
    if (stdout.length === 0) return stderr.toString()
    expect(stderr.toString()).toBe("")
    return (JSON.parse(stdout.toString()) as { host: string }).host
  }

  const places: [argv: string[], env: Record<string, string>, host: string][] = [
    [[], {}, "of-home"],
    [[], { XDG_CONFIG_HOME: "" }, "of-home"],
    [[], { XDG_CONFIG_HOME: "%/xdg" }, "of-xdg"],
    [[], { EDICT_CONFIG: "%/variable.toml" }, "of-variable"],
    [[], { EDICT_CONFIG: "" }, "of-home"],
    [
      ["--config", "%/named.toml"],
      { EDICT_CONFIG: "%/variable.toml", XDG_CONFIG_HOME: "%/xdg" },
      "of-option",
    ],
    [["--config", "../named.toml"], {}, "of-option"],
    [[], { EDICT_HOST: "of-environment" }, "of-environment"],
    [[], { EDICT_HOST: "" }, "of-home"],
    [["given"], { EDICT_HOST: "of-environment" }, "given"],
  ]
  test.each(places)("%j with %j: %s", (argv, env, host) => {
    const here = (text: string) => text.replace("%", home)
    const variables = Object.entries(env).map(([name, value]) => [name, here(value)] as const)
    expect(chosen(argv.map(here), Object.fromEntries(variables))).toBe(host)
  })

  test("no config: no host, and the line says where one could be", () => {
    const line = chosen([], { HOME: join(home, "nobody") })
    expect(line).toStartWith("edict: no host given")
    expect(line).toContain(join(home, "nobody/.config/edict/config.toml"))
    expect(line.split("\n")).toHaveLength(2)
  })

  const unreadable: [string[], Record<string, string>, string][] = [
    [["--config", "/nowhere.toml"], {}, "/nowhere.toml: cannot read the host config"],
    [[], { EDICT_CONFIG: "/nowhere.toml" }, "/nowhere.toml: cannot read the host config"],
    [["--config", "/"], {}, "/: cannot read the host config"],
  ]
  test.each(unreadable)("%j with %j is an error", (argv, env, message) => {
    const line = chosen([...argv, "h"], env)
    expect(line).toStartWith(`edict: ${message}`)
    expect(line.split("\n")).toHaveLength(2)
  })
})
