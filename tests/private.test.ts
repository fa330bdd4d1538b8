// Inputs that a host may not fetch by itself: a lent agent, inputs that are sent, and secrets that stay secret.
import { afterAll, beforeAll, describe, expect, test } from "bun:test"
import { appendFileSync, existsSync, readFileSync, writeFileSync } from "node:fs"
import { chooseHosts, parseArguments, parseConfig, secretSettings, withoutSecret } from "../edict"
import { GIT_INIT, writeFlake } from "./lab/flake"
import { nixAvailable, startHost, type Host, type NixVersion, type Result } from "./lab/lab"
import { project, type Project, type ProjectOptions } from "./support"

const VERSIONS: NixVersion[] = ["2.8", "2.26", "2.34"]
const available = new Map(
  await Promise.all(VERSIONS.map(async (nix) => [nix, (await nixAvailable(nix)) === true] as const)),
)

const ownLines = (stderr: string): string[] => stderr.split("\n").filter((line) => line.startsWith("edict:"))

/** A server with a repository that nobody reads without a key. */
let server: Host

beforeAll(async () => {
  server = await startHost({ name: "git", sshdConfig: ["LogLevel VERBOSE"] })
  const made = await server.sh(`git config --global user.name x && git config --global user.email x@x
    mkdir -p dep/deep && cd dep && echo '{ outputs = _: { value = builtins.readFile ./deep/value; }; }' >flake.nix
    printf private >deep/value; echo '#!/bin/sh' >run.sh; chmod +x run.sh; ln -s deep/value link; ln -s nowhere broken
    echo x >'a name'; echo x >"ä"; echo x >"$(printf 'two\\nlines')"; chmod 444 'a name'
    git init -q -b main && git add -A && git commit -qm first`)
  if (made.code !== 0) throw new Error(made.stderr)
})

afterAll(() => server.stop())

/** A project whose flake has the private input; its client may read it, its host knows the server, and no more. */
async function privateProject(
  options: Partial<ProjectOptions> = {},
  input = (): string => `git+ssh://root@127.0.0.1:${server.port}/root/dep?ref=main`,
): Promise<Project> {
  const p = await project({ ...options, flake: { input: input() }, git: false })
  const known = `[127.0.0.1]:${server.port} ${server.hostKey()}\n`
  const key = readFileSync(p.client.outside("/root/.ssh/id_ed25519.pub"), "utf8")
  appendFileSync(server.outside("/root/.ssh/authorized_keys"), key)
  appendFileSync(p.client.outside("/root/.ssh/known_hosts"), known)
  appendFileSync(p.host.outside("/root/.ssh/known_hosts"), known)
  writeFileSync(p.client.outside("/root/send.toml"), "[hosts.h]\nsend-inputs = true\n")
  const lock = "nix --extra-experimental-features 'nix-command flakes' flake lock"
  const made = await p.sh(`git init -q && git add -A && ${lock} && ${GIT_INIT.replace("git init -q .", ":")}`)
  if (made.code !== 0) throw new Error(made.stderr)
  return p
}

const SEND = ["--config", "/root/send.toml"]
const BUILD = ["nix", "build", ".#input"]
const inShell = (script: string): string[] => ["nix", "develop", "-c", "sh", "-c", script]

/** The machine knows no input any more. */
const forget = (machine: Pick<Host, "sh">): Promise<Result> =>
  machine.sh("rm -rf .cache/nix p/result; nix-store --gc >/dev/null 2>&1")

/** The store path of the private input, which the lock file of the project fixes. */
async function inputOf(p: Project): Promise<string> {
  const plan = await p.edict([...SEND, "--dry-run", "--json", "h", ...BUILD])
  const { inputs } = JSON.parse(plan.stdout) as { inputs: string[] }
  expect(inputs).toHaveLength(1)
  return inputs[0]!
}

type Report = { stages: { stage: string }[]; bytesUp: number; notes: string[] }

/** Runs edict, and reads what it reports. */
async function reported(p: Project, argv: string[]): Promise<Result & { report: Report; stages: string[] }> {
  const result = await p.edict(["--report", "/tmp/report", ...argv])
  const report = JSON.parse(readFileSync(p.client.outside("/tmp/report"), "utf8")) as Report
  return { ...result, report, stages: report.stages.map(({ stage }) => stage) }
}

/** How many commands sshd has started. */
const sessions = (host: Host): number => host.log().match(/Starting session: /g)?.length ?? 0

for (const nix of VERSIONS) {
  describe.skipIf(!available.get(nix))(`Nix ${nix} over there`, () => {
    let p: Project
    let input = ""

    beforeAll(async () => {
      p = await privateProject({ host: { nix, sshdConfig: ["LogLevel VERBOSE"] } })
      input = await inputOf(p)
    })

    afterAll(() => p[Symbol.asyncDispose]())

    test("a host without a key: the message names both ways", async () => {
      const run = await p.edict(["h", ...BUILD])
      expect(run).toMatchObject({ code: 1, stdout: "" })
      expect(run.stderr).toContain("root@127.0.0.1: Permission denied (publickey).")
      expect(ownLines(run.stderr)).toEqual([
        "edict: h has no key for the server that an input lies on; try: -A, which lends it your ssh agent; or send-inputs = true in [hosts.h], which fetches locked inputs here and sends them",
      ])
      expect(existsSync(p.host.outside(input))).toBeFalse()
    })

    test("send-inputs: it builds, and the host asked nobody", async () => {
      const before = sessions(server)
      const run = await reported(p, [...SEND, "h", ...BUILD])
      expect(run).toMatchObject({ code: 0, stdout: "" })
      expect((await p.sh("cat result")).stdout).toBe("private")
      expect(run.report.bytesUp).toBeGreaterThan(1000)
      expect(sessions(server)).toBe(before)
      const valid = await p.host.sh(`nix-store --check-validity ${input} && nix-store --verify-path ${input}`)
      expect(valid).toMatchObject({ code: 0 })
      expect((await p.host.sh("ls -A .cache/edict/run")).stdout).toBe("")
    })

    test("once it is there: nothing is sent, no step is added, and without send-inputs it is found, too", async () => {
      const with_ = sessions(p.host)
      const again = await reported(p, [...SEND, "h", ...BUILD])
      expect(again).toMatchObject({ code: 0 })
      expect(again.report.bytesUp).toBe(0)
      expect(again.stages).not.toContain("upload")
      expect(sessions(p.host) - with_).toBe(2) // agent and command
      const traced = await p.edict(["-vv", ...SEND, "h", ...BUILD])
      const requests = traced.stderr.split("\n").filter((line) => line.startsWith("edict: > "))
      expect(requests.map((line) => line.split(" ")[2]!)).toEqual(["hello", "valid", "tree", "run"])
      expect(requests.find((line) => line.startsWith("edict: > valid "))).toContain(input.slice(0, 40))
      const without = await p.edict(["-vv", "h", ...BUILD])
      expect(without).toMatchObject({ code: 0 })
      expect(without.stderr).not.toContain("> valid")
    })

    test("a small edit still rides along in one go", async () => {
      await p.sh("echo edited >hello.txt")
      const run = await reported(p, [...SEND, "h", "nix", "eval", "--raw", ".#input.text"])
      expect(run.stages).not.toContain("upload")
      expect(run).toMatchObject({ code: 0, stdout: "private" })
    })

    test("garbage was collected over there: it is sent again; and here: it is fetched here", async () => {
      await forget(p.host)
      expect(await p.edict([...SEND, "h", ...BUILD])).toMatchObject({ code: 0 })
      await Promise.all([forget(p.host), forget(p.client)])
      expect(existsSync(p.client.outside(input))).toBeFalse()
      const before = sessions(server)
      expect(await p.edict([...SEND, "h", ...BUILD])).toMatchObject({ code: 0 })
      expect((await p.sh("cat result")).stdout).toBe("private")
      expect(sessions(server)).toBeGreaterThan(before)
    })

    test("what cannot be fetched here either: said, and the host may try", async () => {
      await Promise.all([forget(p.host), forget(p.client)])
      await p.client.sh("mv .ssh/id_ed25519 key; cp key .ssh/other; sed -i s/id_ed25519/other/ .ssh/config")
      const run = await p.edict([...SEND, "h", ...BUILD])
      await p.client.sh("mv key .ssh/id_ed25519; sed -i s/other/id_ed25519/ .ssh/config")
      expect(run.code).toBe(1)
      const [here, there] = ownLines(run.stderr)
      expect(here).toMatch(/^edict: input dep cannot be fetched here, so h has to do it: .*Permission denied/)
      expect(there).toMatch(/^edict: h has no key for the server that an input lies on; try: /)
    })

    test("-A lends the agent; without it there is none", async () => {
      await Promise.all([forget(p.host), forget(p.client)])
      const script = `eval "$(ssh-agent)" >/dev/null; ssh-add -q /root/.ssh/id_ed25519
        edict h ${inShell("echo agent: $SSH_AUTH_SOCK; ssh-add -l").map(quoted).join(" ")}
        edict -A h nix build .#input; echo "code $?"; cat result; rm result
        edict -A h ${inShell("ssh-add -l").map(quoted).join(" ")}
        kill $SSH_AGENT_PID`
      const run = await p.sh(script)
      const lines = run.stdout.split("\n")
      expect(lines[0]).toBe("agent:")
      expect(run.stderr).toContain("Could not open a connection to your authentication agent.")
      expect(lines[1]).toBe("code 0")
      expect(lines[2]).toMatch(/^private256 SHA256:\S+ edict \(ED25519\)$/)
    })
  })
}

const quoted = (word: string): string => `'${word.replaceAll("'", `'\\''`)}'`

describe("a lent agent", () => {
  let p: Project

  beforeAll(async () => {
    p = await project()
    await p.client.sh("ssh-keygen -q -t ed25519 -N '' -C second -f second")
    expect((await p.edict(["h", ...inShell("true")])).code).toBe(0)
  })

  afterAll(() => p[Symbol.asyncDispose]())

  test("forward-agent = true is the same as -A", async () => {
    await p.client.sh("printf '[hosts.h]\\nforward-agent = true\\n' >lend.toml")
    const words = ["--config", "/root/lend.toml", "h", ...inShell("ssh-add -L")].map(quoted).join(" ")
    const run = await p.sh(
      `eval "$(ssh-agent)" >/dev/null; ssh-add -q /root/second; edict ${words}; kill $SSH_AGENT_PID`,
    )
    expect(run.stdout).toMatch(/^ssh-ed25519 \S+ second\n$/)
  })

  test("is the one of this run, not that of whoever opened the connection", async () => {
    const words = ["-A", "h", ...inShell("ssh-add -L")].map(quoted).join(" ")
    const run = await p.sh(`for key in /root/.ssh/id_ed25519 /root/second; do
      eval "$(ssh-agent)" >/dev/null; ssh-add -q $key; edict ${words} | cut -d' ' -f3; kill $SSH_AGENT_PID; done`)
    expect(run.stdout).toBe("edict\nsecond\n")
  })

  test("no agent here: there is none to ask over there, and the command runs", async () => {
    const run = await p.edict(["-A", "h", ...inShell("ssh-add -l >&2; echo ran")])
    expect(run).toMatchObject({ code: 0, stdout: "ran\n" })
    expect(run.stderr).toMatch(/Could not open a connection|[Ee]rror/)
    expect(ownLines(run.stderr)).toEqual([])
  })
})

describe.concurrent("inputs that are sent", () => {
  /** A user `u` of the host, whom its Nix daemon does not trust. */
  async function untrusted(host: Host): Promise<{ [Symbol.asyncDispose](): Promise<void> }> {
    const made = await host.sh(`grep -q ^u: /etc/passwd || echo 'u:*:4243:4243::/tmp/u:/bin/sh' >>/etc/passwd
      grep -q ^u: /etc/shadow || echo 'u:*:1::::::' >>/etc/shadow; echo u:x:4243: >>/etc/group
      mkdir -p /tmp/u && cp -r /root/.ssh /tmp/u/ && chown -R 4243:4243 /tmp/u`)
    if (made.code !== 0) throw new Error(made.stderr)
    const daemon = host.spawn(["nix-daemon"], { timeout: 100_000 })
    await host.sh("until [ -S /nix/var/nix/daemon-socket/socket ]; do sleep 0.1; done")
    return {
      async [Symbol.asyncDispose]() {
        await daemon.kill("SIGKILL")
        await daemon.result
      },
    }
  }

  const trusting: [string, Partial<ProjectOptions>][] = [
    ["Nix 2.8", { host: { nixConfig: ["trusted-users = root"] } }],
    ["busybox alone", { host: { busybox: true, nixConfig: ["trusted-users = root"] } }],
    ...(available.get("2.34")
      ? [["Nix 2.34", { host: { nix: "2.34", nixConfig: ["trusted-users = root"] } }] as const]
      : []),
  ].map(([name, options]) => [name, options] as [string, Partial<ProjectOptions>])
  test.each(trusting)("a user there whom nobody trusts will do: %s", async (_, options) => {
    await using p = await privateProject(options)
    await using _daemon = await untrusted(p.host)
    await p.client.sh(`echo '[hosts."u@h"]\nsend-inputs = true' >>send.toml`)
    const run = await p.edict([...SEND, "u@h", "nix", "eval", "--raw", ".#input.text"])
    expect({ ...run, stderr: ownLines(run.stderr) }).toMatchObject({ code: 0, stdout: "private", stderr: [] })
    const input = await inputOf(p)
    expect(
      await p.host.sh(`nix-store --verify-path ${input}; ls ${input}; readlink ${input}/broken`),
    ).toMatchObject({
      code: 0,
      stdout: expect.stringMatching(/\nnowhere\n$/),
    })
    expect((await p.host.sh("ls -A /tmp/u/.cache/edict/run")).stdout).toBe("")
  })

  test("a local repository as input goes to such a user, too, and needs no send-inputs", async () => {
    await using p = await project({ host: { nixConfig: ["trusted-users = root"] }, flake: false, git: false })
    await using _daemon = await untrusted(p.host)
    const made = await p.client
      .sh(`mkdir dep && cd dep && echo '{ outputs = _: { value = "local"; }; }' >flake.nix
      git init -q && git add -A && git commit -qm x`)
    expect(made.code).toBe(0)
    writeFlake(p.file("."), { input: "git+file:///root/dep" })
    const lock = "nix --extra-experimental-features 'nix-command flakes' flake lock"
    expect((await p.sh(`git init -q && git add -A && ${lock} && git add -A && git commit -qm x`)).code).toBe(
      0,
    )
    const evaluate = ["nix", "eval", "--raw", ".#input.text"]
    expect(await reported(p, ["u@h", ...evaluate])).toMatchObject({ code: 0, stdout: "local" })
    const again = await reported(p, ["u@h", ...evaluate])
    expect(again).toMatchObject({ code: 0, stdout: "local" })
    expect(again.stages).not.toContain("upload")
  })

  test("compressed, too", async () => {
    await using p = await privateProject()
    await p.client.sh("echo 'compress = true' >>send.toml")
    const run = await p.edict(["-v", ...SEND, "h", ...BUILD])
    expect(run.code).toBe(0)
    expect(run.stderr).toMatch(/tar .* \| zstd -1 -c \| .*ssh/)
    expect((await p.sh("cat result")).stdout).toBe("private")
  })

  test("without Nix here they cannot be: one line, and the other way", async () => {
    await using p = await privateProject()
    await p.client.sh(
      "mkdir bin && for x in bash sh ssh rsync git tar env cat tee tr grep awk sort comm xargs; do ln -s $(command -v $x) bin/; done",
    )
    const run = await p.sh(`PATH=/root/bin; edict ${[...SEND, "h", ...BUILD].join(" ")}`)
    expect(run.code).toBe(254)
    expect(ownLines(run.stderr)).toEqual([
      "edict: send-inputs needs Nix here, which fetches them; try: install Nix, or -A in place of send-inputs in [hosts.h]",
    ])
  })

  test("no space over there: one line, nothing left, and with space it goes on", async () => {
    const made = await server.sh(
      "cp -r dep big && cd big && head -c 20000000 /dev/urandom >big && git add -A && git commit -qm big",
    )
    expect(made.code).toBe(0)
    const big = `git+ssh://root@127.0.0.1:${server.port}/root/big?ref=main`
    await using p = await privateProject({ host: { diskLimit: "12m" } }, () => big)
    const run = await p.edict([...SEND, "h", ...BUILD])
    expect(run.code).toBe(254)
    expect(ownLines(run.stderr)).toHaveLength(1)
    expect(run.stderr).toMatch(
      /^edict: upload of inputs failed .*(No space left on device|Wrote only .*); try: free some space on h: /m,
    )
    expect((await p.host.sh("find .cache/edict -name inputs")).stdout).toBe("")
    await p.host.sh("mount -o remount,size=100m /root")
    expect(await p.edict([...SEND, "h", ...BUILD])).toMatchObject({ code: 0 })
  })

  test("an input that is not locked yet: it is to be locked here", async () => {
    await using p = await privateProject()
    await p.sh("git rm -q --cached flake.lock; rm flake.lock; git commit -qm unlocked")
    const run = await p.edict([...SEND, "h", ...BUILD])
    expect(run.code).toBe(1)
    expect(ownLines(run.stderr)).toEqual([
      "edict: h has no key for the server that an input lies on; try: -A, which lends it your ssh agent; or nix flake lock here, first: send-inputs sends what flake.lock has",
    ])
    expect((await p.sh("nix --extra-experimental-features 'nix-command flakes' flake lock")).code).toBe(0)
    expect(await p.edict([...SEND, "h", ...BUILD])).toMatchObject({ code: 0 })
  })

  test("the plan: what --dry-run says of them", async () => {
    await using p = await privateProject()
    const plan = await p.edict([...SEND, "--dry-run", "h", ...BUILD])
    expect(plan.stdout).toContain(
      "# 1 locked input: what h lacks of them, fetched here first if need be\ntar -cf - ",
    )
    const json = await p.edict(["--dry-run", "--json", "h", ...BUILD])
    expect(JSON.parse(json.stdout)).not.toHaveProperty("inputs")
    expect((await p.edict(["--dry-run", "h", ...BUILD])).stdout).not.toContain("locked input")
    // The flake that is meant without a word, and one with others behind it.
    const implicit = await p.edict([...SEND, "--dry-run", "--json", "h", "nix", "build"])
    expect((JSON.parse(implicit.stdout) as { inputs: string[] }).inputs).toHaveLength(1)
  })
})

// ── Secrets ───

const SECRET = "ghp_s3cr3tT0ken"

describe("secrets of the command", () => {
  const lines: [string, string[], string[]][] = [
    ["nix", ["build", "--option", "access-tokens", "github.com=x", ".#y"], ["access-tokens = github.com=x"]],
    ["nix", ["--access-tokens", "a=b c=d", "build"], ["access-tokens = a=b c=d"]],
    ["nix", ["build", "--extra-access-tokens", "a=b"], ["extra-access-tokens = a=b"]],
    ["nix", ["build", "--option", "extra-access-tokens", "a=b"], ["extra-access-tokens = a=b"]],
    ["nix-build", ["-A", "x", "--option", "access-tokens", "a=b"], ["access-tokens = a=b"]],
    ["nixos-rebuild", ["build", "--option", "access-tokens", "a=b"], ["access-tokens = a=b"]],
    [
      "nix",
      ["build", "--option", "access-tokens", "a=b", "--access-tokens", "c=d"],
      ["access-tokens = a=b", "access-tokens = c=d"],
    ],
    ["nix", ["build", "--option", "impure-env", "TOKEN=x"], ["impure-env = TOKEN=x"]],
    // Words of what runs, not of Nix; names alone; and what a line of nix.conf cannot say.
    ["nix", ["run", ".#x", "--", "--option", "access-tokens", "a=b"], []],
    ["nix", ["develop", "-c", "x", "--access-tokens", "a=b"], []],
    ["nix", ["build", "--option", "access-tokens"], []],
    ["nix", ["build", "--access-tokens"], []],
    ["nix", ["config", "show", "access-tokens"], []],
    ["nix", ["build", "--option", "access-tokens", "a=b#c"], []],
    ["nix", ["build", "--option", "cores", "2", ".#access-tokens"], []],
  ]
  test.each(lines)("%s %j: %j", (program, words, expected) => {
    const found = secretSettings(program, words)
    expect(found.map(({ line }) => line)).toEqual(expected)
    for (const { indices, line } of found) {
      expect(words[indices.at(-1)!]).toBe(line.slice(line.indexOf("= ") + 2))
      expect(words[indices[0]!]).toStartWith("--")
    }
  })

  test.each([
    ["git+https://user:token@host/x?dir=y", "git+https://***@host/x?dir=y"],
    ["https://token@github.com/o/r.tar.gz#x", "https://***@github.com/o/r.tar.gz#x"],
    ["ssh://git:pw@host/x", "ssh://git:***@host/x"],
    ["git+ssh://git@host/x", "git+ssh://git@host/x"],
    ["https://h/x.tar.gz?token=abc&y=1", "https://h/x.tar.gz?token=***&y=1"],
    ["github:o/r?host=h", "github:o/r?host=h"],
    ["path:/a@b:c", "path:/a@b:c"],
    ["nix build .#x", "nix build .#x"],
  ])("%s is shown as %s", (text, expected) => {
    expect(withoutSecret(text)).toBe(expected)
  })

  let p: Project

  beforeAll(async () => {
    p = await project()
    expect((await p.edict(["h", ...inShell("true")])).code).toBe(0)
  })

  afterAll(() => p[Symbol.asyncDispose]())

  /** The command lines of all processes of a machine. */
  const commandLines = async (machine: Pick<Host, "sh">): Promise<string[]> =>
    (
      await machine.sh("for f in /proc/[0-9]*/cmdline; do tr '\\0\\n' '  ' <$f; echo; done 2>/dev/null")
    ).stdout.split("\n")

  const TOKEN = ["--option", "access-tokens", `github.com=${SECRET}`]
  const URL = `https://user:${SECRET}@127.0.0.1:1/x.tar.gz`

  test("a token reaches Nix over there, and stands on no command line but the one that was typed", async () => {
    const running = p.spawn([
      "-vv",
      "--report",
      "/tmp/report",
      "h",
      "nix",
      "develop",
      ...TOKEN,
      "-c",
      "sh",
      "-c",
      'echo "$NIX_CONFIG"; read x',
    ])
    await running.waitFor(`access-tokens = github.com=${SECRET}`)
    for (let turn = 0; turn < 3; turn++) {
      const [here, there] = await Promise.all([commandLines(p.client), commandLines(p.host)])
      expect(there.some((line) => line.includes("read x"))).toBeTrue()
      expect(there.filter((line) => line.includes(SECRET))).toEqual([])
      expect(
        here.filter(
          (line) => line.includes(SECRET) && !/edict -vv --report|nsenter|^\/bin\/sh -c cd/.test(line),
        ),
      ).toEqual([])
      expect(here.some((line) => /^\S*ssh /.test(line))).toBeTrue()
    }
    expect((await p.host.sh(`grep -r ${SECRET} /root/.cache/edict /tmp 2>/dev/null`)).stdout).toBe("")
    running.write("\n")
    running.end()
    const { code, stderr } = await running.result
    expect(code).toBe(0)
    expect(stderr).toContain("edict: > run ")
    expect(stderr).not.toContain(SECRET)
    expect(readFileSync(p.client.outside("/tmp/report"), "utf8")).not.toContain(SECRET)
    expect((await p.client.sh(`grep -r ${SECRET} .local .cache /tmp/edict* 2>/dev/null`)).stdout).toBe("")
  })

  test("Nix takes it: the last one counts, and it comes after what the host config says", async () => {
    writeFileSync(
      p.client.outside("/root/env.toml"),
      `[hosts.h]\nenv = { NIX_CONFIG = "access-tokens = a=1" }\n`,
    )
    const show = ["--config", "/root/env.toml", "h", "nix", "show-config"]
    const setting = async (words: string[]) =>
      /^access-tokens = (.*)$/m.exec((await p.edict([...show, ...words])).stdout)?.[1]
    expect(await setting([])).toBe("a=1")
    expect(await setting(["--option", "access-tokens", "b=2", "--access-tokens", "c=3"])).toBe("c=3")
    expect(await setting(["--extra-access-tokens", "b=2"])).toBe("a=1 b=2")
  })

  test("variables of the host config: not in what -vv tells", async () => {
    writeFileSync(p.client.outside("/root/env.toml"), `[hosts.h]\nenv = { TOKEN = "${SECRET}" }\n`)
    const run = await p.edict([
      "-vv",
      "--config",
      "/root/env.toml",
      "h",
      ...inShell('test "$TOKEN" && echo set'),
    ])
    expect(run).toMatchObject({ code: 0, stdout: "set\n" })
    expect(run.stderr).toContain("eTOKEN…")
    expect(run.stderr).not.toContain(SECRET)
  })

  test.each<[string, string[]]>([
    ["the plan", ["--dry-run"]],
    ["the plan as JSON", ["--dry-run", "--json"]],
  ])("%s names the setting, and no value", async (_, options) => {
    const { code, stdout, stderr } = await p.edict([
      ...options,
      "h",
      "nix",
      "build",
      ...TOKEN,
      URL,
      ".#hello",
    ])
    expect(code).toBe(0)
    expect(stdout).toContain("access-tokens")
    expect(stdout).toContain("https://***@127.0.0.1:1/x.tar.gz")
    expect(stdout + stderr).not.toContain(SECRET)
  })

  test("messages that repeat the command, and an address that fails", async () => {
    const unnamed = await p.edict(["nix", "build", ...TOKEN, URL])
    expect(unnamed.code).toBe(254)
    expect(unnamed.stderr).toContain(
      "edict HOST nix build --option access-tokens '…' 'https://***@127.0.0.1:1/x.tar.gz'",
    )
    const failed = await p.edict(["-vv", "--report", "/tmp/report", "h", "nix", "eval", `${URL}#x`])
    expect(failed.code).toBe(1)
    const own = ownLines(failed.stderr).join("\n")
    expect(own).toContain("h does not reach a server")
    expect(own).not.toContain(SECRET)
    expect(readFileSync(p.client.outside("/tmp/report"), "utf8")).not.toContain(SECRET)
  })
})

describe("credentials of this side fetch for the host", () => {
  const archive = Bun.spawnSync([
    "sh",
    "-c",
    `d=$(mktemp -d) && mkdir $d/dep && cd $d &&
    echo '{ outputs = _: { value = "from the web"; }; }' >dep/flake.nix && tar -czf - dep && rm -rf $d`,
  ]).stdout
  const seen: string[] = []
  const web = Bun.serve({
    hostname: "127.0.0.1",
    port: 0,
    fetch: ({ headers }) => {
      const given = headers.get("authorization") ?? "none"
      seen.push(given)
      const wanted = `Basic ${Buffer.from(`me:${SECRET}`).toString("base64")}`
      return given === wanted ? new Response(archive) : new Response("no", { status: 401 })
    },
  })

  afterAll(() => web.stop(true))

  test("netrc-file: used here alone, and seen nowhere", async () => {
    const p = await project({ flake: { input: `http://127.0.0.1:${web.port}/dep.tar.gz` }, git: false })
    await using _ = p
    await p.client.sh(`mkdir -p .config/nix && echo 'netrc-file = /root/netrc' >.config/nix/nix.conf
      echo 'machine 127.0.0.1 login me password ${SECRET}' >netrc; chmod 600 netrc
      printf '[hosts.h]\\nsend-inputs = true\\n' >send.toml`)
    const lock = "nix --extra-experimental-features 'nix-command flakes' flake lock"
    const made = await p.sh(`git init -q && git add -A && ${lock} && git add -A && git commit -qm x`)
    expect(made).toMatchObject({ code: 0 })
    const without = await p.edict(["h", "nix", "build", ".#input"])
    expect(without.code).toBe(1)
    expect(ownLines(without.stderr)).toHaveLength(1)
    expect(without.stderr).toMatch(
      /edict: h has no token or password for an input, .*send-inputs = true in \[hosts\.h\]/,
    )
    await forget(p.client)
    seen.length = 0
    const run = await p.edict(["-vv", "--report", "/tmp/report", ...SEND, "h", "nix", "build", ".#input"])
    expect(run.code).toBe(0)
    expect((await p.sh("cat result")).stdout).toBe("from the web")
    expect(new Set(seen)).toEqual(new Set([`Basic ${Buffer.from(`me:${SECRET}`).toString("base64")}`]))
    expect(run.stdout + run.stderr + readFileSync(p.client.outside("/tmp/report"), "utf8")).not.toContain(
      SECRET,
    )
    expect((await p.host.sh(`grep -r ${SECRET} /root /tmp /nix/store 2>/dev/null`)).stdout).toBe("")
  })
})

test("send-inputs is off unless the config says so", async () => {
  const invocation = await parseArguments(["a", "nix", "build"], {})
  const config = await parseConfig("[hosts.a]\n[hosts.b]\nsend-inputs = true\n", "/c")
  const hosts = (host: string) => chooseHosts(config, { ...invocation, host }, { HOME: "/home/ed" })
  expect(hosts("a")[0]!.sendInputs).toBeFalse()
  expect(hosts("b")[0]!.sendInputs).toBeTrue()
  expect(hosts("c")[0]!.sendInputs).toBeFalse()
})
