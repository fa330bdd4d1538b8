/** The lab itself: whether its machines are what the other tests take them for. */

import { afterAll, beforeAll, describe, expect, test } from "bun:test"
import { existsSync, readdirSync, readFileSync, readlinkSync } from "node:fs"
import { join } from "node:path"
import { GIT_INIT, readArgs, SYSTEM, writeFlake, writeInput } from "./lab/flake"
import {
  machinesDirectory,
  nixAvailable,
  REPOSITORY,
  startClient,
  startHost,
  type Client,
  type Host,
} from "./lab/lab"

const FLAKES = "--extra-experimental-features 'nix-command flakes'"

describe("two hosts and a client", () => {
  let h1: Host, h2: Host, client: Client

  beforeAll(async () => {
    ;[h1, h2] = await Promise.all([startHost({ name: "h1" }), startHost({ name: "h2", flakes: true })])
    client = await startClient({ hosts: [h1, h2] })
  })

  afterAll(async () => {
    await Promise.all([h1.stop(), h2.stop(), client.stop()])
  })

  test("the client reaches both by name, and asks nothing", async () => {
    const { stdout, stderr } = await client.sh("ssh h1 hostname; ssh root@h2 hostname; hostname; ssh h1 pwd")
    expect(stdout).toBe("h1\nh2\nclient\n/root\n")
    expect(stderr).toBe("")
  })

  test("each has its own home, /tmp, /nix and host name", async () => {
    await h1.sh("echo one | tee /root/mark /tmp/mark /nix/mark")
    for (const path of ["/root/mark", "/tmp/mark", "/nix/mark"]) {
      expect(readFileSync(h1.outside(path), "utf8")).toBe("one\n")
      expect(existsSync(h2.outside(path))).toBeFalse()
      expect(existsSync(path)).toBeFalse()
    }
    expect(readFileSync(h1.outside("/etc/hostname"), "utf8")).toBe("h1\n")
  })

  test("results carry code, signal, exact bytes and what was written to stderr", async () => {
    const result = await client.run(["sh", "-c", "cat; echo oops >&2; exit 3"], {
      stdin: Buffer.from([0, 255, 10]),
    })
    expect([result.code, result.stderr, [...result.bytes]]).toEqual([3, "oops\n", [0, 255, 10]])
    expect(await client.sh("kill -INT $$")).toMatchObject({ code: 130, signal: "SIGINT" })
    expect(await client.sh("sleep 60", { timeout: 200 })).toMatchObject({ code: 124 })
    expect(await client.sh("sleep 60 & echo started")).toMatchObject({
      code: 0,
      stdout: "started\n",
      held: true,
    })
  })

  test("the environment of the tests stays outside", async () => {
    const { stdout } = await client.sh("env | sort", { env: { EXTRA: "1" } })
    const names = stdout.match(/^\w+(?==)/gm)
    expect(names).toEqual(["EXTRA", "HOME", "LANG", "LOGNAME", "PATH", "PWD", "SHELL", "TERM", "USER"])
  })

  test("flakes build here and there", async () => {
    for (const machine of [h1, client]) {
      writeFlake(machine.outside("/root/flake"))
      const built = await machine.sh(`${GIT_INIT} || true; nix ${FLAKES} build .#multi .#hello .#chain`, {
        cwd: "/root/flake",
        env: {
          GIT_AUTHOR_NAME: "x",
          GIT_AUTHOR_EMAIL: "x",
          GIT_COMMITTER_NAME: "x",
          GIT_COMMITTER_EMAIL: "x",
        },
      })
      expect(built).toMatchObject({ code: 0 })
      expect((await machine.sh("cat flake/result-1")).stdout).toBe("hello\n")
    }
    const over = await client.sh(`ssh h1 "cd flake && nix ${FLAKES} run .#args -- a 'b  c' ''"`)
    expect(readArgs(over.stdout)).toEqual(["a", "b  c", ""])
  })

  test("only some have flakes enabled", async () => {
    expect((await h1.sh("nix flake --help")).code).toBe(0) // help is free
    expect((await h1.sh("nix eval --expr 1")).stderr).toContain("experimental")
    expect((await h2.sh("nix eval --expr 1")).stdout).toBe("1\n")
  })

  test("programs of the flake change, wait and fail as asked", async () => {
    const directory = client.path("programs")
    writeInput(client.outside("/root/dep"), "one")
    writeFlake(client.outside(directory), { input: "path:/root/dep", checkFails: true })
    const flake = (command: string, stdin = "") =>
      client.sh(`nix ${FLAKES} ${command}`, { cwd: directory, stdin })
    expect((await flake("run .#exit7")).code).toBe(7)
    expect((await flake("run .#status -- 200")).code).toBe(200)
    expect((await flake("run .#cat", "a\0b")).stdout).toBe("a\0b")
    expect((await flake("run .#spew -- 100000")).bytes.length).toBe(100_000)
    expect((await flake("build .#fails")).stderr).toContain("failing on purpose")
    expect((await flake("flake check")).code).not.toBe(0)
    expect((await flake("develop -c printenv IN_DEV_SHELL")).stdout).toBe("yes\n")
    expect((await flake("run .#bump")).code).toBe(0)
    expect((await flake("fmt")).code).toBe(0)
    expect(readFileSync(client.outside(join(directory, "untidy.txt")), "utf8")).toBe("blanks at the end\n")
    const { stdout } = await client.sh("cat version.txt new/file.txt; ls; test -x script.sh && echo yes", {
      cwd: directory,
    })
    expect(stdout).toStartWith("2\nnew\n")
    expect(stdout).toEndWith("yes\n")
    expect(stdout).not.toContain("old.txt")
    const lock = readFileSync(client.outside(join(directory, "flake.lock")), "utf8")
    writeInput(client.outside("/root/dep"), "two")
    await flake("flake update")
    expect(readFileSync(client.outside(join(directory, "flake.lock")), "utf8")).not.toBe(lock)
    await flake("build .#input")
    expect((await client.sh("cat programs/result")).stdout).toBe("two")
  })

  test("store paths travel from store to store", async () => {
    const { stdout } = await h1.sh("echo text >/root/text; nix-store --add /root/text")
    const path = stdout.trim()
    expect(existsSync(client.outside(path))).toBeFalse()
    expect(await client.run(["nix-copy-closure", "--from", "h1", path])).toMatchObject({ code: 0 })
    expect(readFileSync(client.outside(path), "utf8")).toBe("text\n")
  })

  test("the client has the checkout and Bun", async () => {
    const { stdout } = await client.sh("bun --version; ls tests/lab/lab.ts", { cwd: REPOSITORY })
    expect(stdout).toBe(`${Bun.version}\ntests/lab/lab.ts\n`)
  })

  test("processes can be seen, signalled, and talked to on a terminal", async () => {
    const before = await client.processes()
    const running = client.spawn([
      "sh",
      "-c",
      "trap 'echo caught; exit 9' USR1; echo up; while :; do sleep 0.05; done",
    ])
    await running.waitFor("up")
    expect((await client.processes()).length).toBeGreaterThan(before.length)
    await running.kill("SIGUSR1")
    expect(await running.result).toMatchObject({ code: 9, stdout: "up\ncaught\n" })

    const terminal = client.spawn(["sh", "-c", "tty; echo ready; sleep 60"], { tty: true })
    await terminal.waitFor("ready")
    terminal.write("\x03")
    expect((await terminal.result).code).toBe(130)
    expect(terminal.stdout).toContain("/dev/pts/")
  })

  test("orphans are reaped", async () => {
    await h1.sh("(sleep 0.1 &); true")
    await Bun.sleep(300)
    expect(await h1.processes()).toEqual([])
  })

  test("connections can be dropped", async () => {
    const waiting = client.spawn(["ssh", "h1", "echo up; sleep 60"])
    await waiting.waitFor("up")
    await h1.dropConnections()
    expect((await waiting.result).code).toBe(255)
    expect((await client.sh("ssh h1 echo again")).stdout).toBe("again\n")
    expect(h1.log()).toContain("Accepted publickey for root")
  })
})

describe("kinds of hosts", () => {
  test("login shells", async () => {
    const shells = ["bash", "zsh", "dash", "fish"] as const
    const hosts = await Promise.all(shells.map((shell) => startHost({ name: shell, shell })))
    await using client = await startClient({ hosts })
    for (const [i, shell] of shells.entries()) {
      const script = shell === "fish" ? "status fish-path" : "readlink /proc/$$/exe; true"
      expect((await client.run(["ssh", shell, script])).stdout.trim()).toEndWith(`/${shell}`)
      await hosts[i]?.stop()
    }
  })

  test("another system, and nothing is built for ours", async () => {
    const system = SYSTEM === "x86_64-linux" ? "aarch64-linux" : "x86_64-linux"
    await using host = await startHost({ name: "other", system, flakes: true })
    writeFlake(host.outside("/root/flake"), { systems: [system, SYSTEM] })
    expect((await host.sh("nix eval --impure --raw --expr builtins.currentSystem")).stdout).toBe(system)
    expect((await host.sh("nix build ./flake#hello && cat result")).stdout).toBe("hello\n")
    expect((await host.sh(`nix build ./flake#packages.${SYSTEM}.multi`)).code).not.toBe(0)
  })

  test("a slow network, which can be cut and frozen", async () => {
    await using host = await startHost({ name: "far", delay: 40 })
    await using client = await startClient({ hosts: [host] })
    const session = client.spawn(["ssh", "far", "cat"])
    session.write("first\n")
    await session.waitFor("first")
    const roundTrip = async (word: string) => {
      const start = performance.now()
      session.write(word)
      await session.waitFor(word)
      return performance.now() - start
    }
    const time = await roundTrip("second\n")
    expect(time).toBeGreaterThan(75)
    expect(time).toBeLessThan(400)

    await host.freeze()
    session.write("third\n")
    await Bun.sleep(400)
    expect(session.stdout).not.toContain("third")
    await host.freeze()
    await session.waitFor("third")

    await host.dropConnections()
    expect((await session.result).code).toBe(255)
  })

  test("a delay limits no bandwidth", async () => {
    await using host = await startHost({ name: "far", delay: 20 })
    await using client = await startClient({ hosts: [host] })
    const start = performance.now()
    const { stdout } = await client.sh(
      "head -c 30000000 /dev/zero | ssh far 'tee /root/copy' | wc -c; ssh far wc -c copy",
    )
    expect(stdout).toBe("30000000\n30000000 copy\n")
    expect(performance.now() - start).toBeLessThan(10_000)
  })

  test("hidden programs are not found, others are", async () => {
    await using host = await startHost({ name: "poor", hide: ["rsync", "git", "ps"] })
    await using client = await startClient({ hosts: [host], hide: ["nix", "nix-store"] })
    const over = await client.sh(
      "ssh poor 'rsync --version; echo $?; command -v git ps; command -v tar nix-store'",
    )
    expect(over.stdout).toBe("127\n/usr/bin/tar\n/usr/bin/nix-store\n")
    expect(over.stderr).toContain("command not found")
    expect((await client.sh("nix --version")).code).toBe(127)
    expect((await host.sh("nix-store --version")).code).toBe(0)
  })

  test("busybox, rsync, git and Nix alone", async () => {
    await using host = await startHost({ name: "small", busybox: true, flakes: true })
    await using client = await startClient({ hosts: [host] })
    const script = "for i in sh env bash perl ps rsync; do readlink -f $(command -v $i); done"
    const { stdout } = await client.run(["ssh", "small", script])
    expect(stdout).toMatch(/^(\S*\/busybox\n){3}\S*\/rsync\n$/)
    writeFlake(host.outside("/root/flake"))
    expect((await client.sh("ssh small 'nix run ./flake#args -- x; nix build ./flake#chain'")).stdout).toBe(
      "78\n",
    )
    expect(await client.sh("echo up >up; rsync up small:up && ssh small cat up")).toMatchObject({
      stdout: "up\n",
    })
  })

  test("Nix beside PATH, or none", async () => {
    const options = [
      { name: "beside", nixOnPath: false },
      { name: "none", nix: "none" },
    ] as const
    const [beside, none] = await Promise.all(options.map(startHost))
    await using client = await startClient({ hosts: [beside!, none!] })
    const nix = "/nix/var/nix/profiles/default/bin/nix"
    expect((await client.sh("ssh beside nix --version")).code).toBe(127)
    expect((await client.sh(`ssh beside ${nix} --version`)).code).toBe(0)
    writeFlake(beside!.outside("/root/flake"))
    expect(await client.sh(`ssh beside "${nix} ${FLAKES} build ./flake#chain"`)).toMatchObject({ code: 0 })
    expect((await client.sh(`ssh none '${nix} --version || nix --version'`)).code).toBe(127)
    await Promise.all([beside!.stop(), none!.stop()])
  })

  test("a full disk", async () => {
    await using host = await startHost({ name: "full", diskLimit: "2m" })
    await using client = await startClient({ hosts: [host] })
    const { code, stderr } = await client.sh("head -c 5000000 /dev/zero | ssh full 'cat >big'")
    expect([code, stderr]).toEqual([1, expect.stringContaining("No space left")])
    expect(existsSync(host.outside("/root/big"))).toBeTrue()
  })

  test("further lines for sshd", async () => {
    await using host = await startHost({
      name: "strict",
      sshdConfig: ["MaxSessions 1", "SetEnv GREETING=hi"],
    })
    await using client = await startClient({ hosts: [host] })
    expect((await client.sh("ssh strict 'echo $GREETING'")).stdout).toBe("hi\n")
  })

  for (const version of ["2.26", "2.34"] as const) {
    test(`Nix ${version}`, async () => {
      const available = await nixAvailable(version)
      if (available !== true) return console.warn(`skipped: ${available}`)
      await using host = await startHost({ name: "new", nix: version })
      await using client = await startClient({ hosts: [host] })
      expect((await client.sh("ssh new nix --version")).stdout).toContain(` ${version}.`)
      expect((await client.sh("nix --version")).stdout).toContain(" 2.8.")
      writeFlake(host.outside("/root/flake"))
      const built = await client.sh(
        `ssh new "nix ${FLAKES} build ./flake#chain ./flake#hello -o out && cat out-1"`,
      )
      expect(built).toMatchObject({ code: 0, stdout: "hello\n" })
      const moved = await client.sh("ssh new 'nix-store --export $(nix-store -qR out)' | nix-store --import")
      expect(moved.stdout.trim().split("\n")).toHaveLength(3)
    })
  }
})

describe("the end", () => {
  test("stop() leaves no process, no mount and no file", async () => {
    const host = await startHost({ name: "brief", delay: 0 })
    const client = await startClient({ hosts: [host] })
    await client.sh("setsid sleep 600 >/dev/null 2>&1 & ssh -f brief sleep 600 >/dev/null 2>&1")
    const machines = [host, client]
    const spaces = machines.map((machine) => processSpace(machine.pid))
    expect(spaces.map((space) => members(space).length > 1)).toEqual([true, true])
    await Promise.all(machines.map((machine) => machine.stop()))
    expect(spaces.flatMap(members)).toEqual([])
    expect(machines.filter((machine) => existsSync(machine.directory))).toEqual([])
    expect(readFileSync("/proc/self/mounts", "utf8")).not.toContain("edict-lab")
  })

  test.each(["SIGKILL", "SIGINT", "SIGTERM"] as const)(
    "so does the death of the test run by %s",
    async (signal) => {
      const script = `
      const { startHost } = await import(${JSON.stringify(join(import.meta.dir, "lab/lab.ts"))})
      const host = await startHost({ name: "orphan", delay: 0 })
      console.log(host.pid, host.directory)
      await Bun.sleep(60_000)`
      await using child = Bun.spawn([process.execPath, "-e", script], { stdout: "pipe" })
      const reader = child.stdout.getReader()
      const line = new TextDecoder().decode((await reader.read()).value)
      const [pid = "", directory = ""] = line.trim().split(" ")
      const space = processSpace(Number(pid))
      expect(members(space).length).toBeGreaterThan(1)
      child.kill(signal)
      for (let i = 0; i < 100 && existsSync(directory); i++) await Bun.sleep(20)
      expect([members(space), existsSync(directory)]).toEqual([[], false])
    },
  )

  test("a host that cannot start says why, and leaves nothing", async () => {
    const name = `broken-${process.pid}`
    const attempt = startHost({ name, sshdConfig: ["NoSuchOption yes"] })
    await expect(attempt).rejects.toThrow(/NoSuchOption/)
    expect(readdirSync(machinesDirectory()).filter((file) => file.includes(name))).toEqual([])
  })
})

function processSpace(pid: number): string {
  return readlinkSync(`/proc/${pid}/ns/pid`)
}

/** The processes in a process name space. */
function members(space: string): string[] {
  const pids = readdirSync("/proc").filter((name) => /^\d+$/.test(name))
  return pids.filter((pid) => {
    try {
      return processSpace(Number(pid)) === space
    } catch {
      return false // ended meanwhile
    }
  })
}
