// Old and new: the main examples with every pair of versions of Nix, rsync and OpenSSH, here and there.
import { afterAll, beforeAll, describe, expect, setDefaultTimeout, test } from "bun:test"
import { edict, expectSame, mainExamples, makePair, script, type Pair } from "./examples"
import {
  nixAvailable,
  startClient,
  startHost,
  versionAvailable,
  type Client,
  type Host,
  type NixVersion,
} from "./lab/lab"

setDefaultTimeout(180_000)

type Machines = { hosts: Host[]; clients: Client[] }

/** Machines that are started before the first test of a block, and stopped after the last. */
function shared(start: () => Promise<Machines>): (here: number, there: number, dir: string) => Pair {
  const machines: Machines = { hosts: [], clients: [] }
  beforeAll(async () => Object.assign(machines, await start()))
  afterAll(async () => {
    await Promise.all([...machines.hosts, ...machines.clients].map((machine) => machine.stop()))
  })
  return (here, there, dir) => ({ client: machines.clients[here]!, host: machines.hosts[there]!, dir })
}

/** Every pair of these. */
const pairs = <T>(items: readonly T[]): [here: T, there: T][] =>
  items.flatMap((here) => items.map((there): [T, T] => [here, there]))

// ── Nix ───

const NIX: NixVersion[] = ["2.8", "2.26", "2.34"]
const had: NixVersion[] = []
for (const nix of NIX) {
  const available = await nixAvailable(nix)
  if (available === true) had.push(nix)
  else console.log(`skipped: pairs with ${available}`)
}

describe("Nix", () => {
  const pairOf = shared(async () => {
    const hosts = await Promise.all(had.map((nix) => startHost({ name: `nix-${nix}`, nix })))
    return { hosts, clients: await Promise.all(had.map((nix) => startClient({ nix, hosts }))) }
  })

  for (const [here, there] of pairs(NIX))
    test.concurrent.skipIf(!had.includes(here) || !had.includes(there))(
      `${here} here, ${there} there`,
      async () => {
        // The clients are one machine for a host, so each has directories of its own.
        const pair = pairOf(had.indexOf(here), had.indexOf(there), `/root/${here}-${there}`)
        const versions = await Promise.all([pair.client, pair.host].map((one) => one.sh("nix --version")))
        expect(versions.map(({ stdout }) => / (\d+\.\d+)/.exec(stdout)?.[1])).toEqual([here, there])
        await makePair(pair)
        await mainExamples(pair)
      },
    )
})

// ── rsync and OpenSSH ───

const OLD = { rsync: "3.2", openssh: "9.2" } as const
const NEW = { rsync: "3.5", openssh: "10" } as const
const ages = [OLD, NEW]
const missing = (
  await Promise.all(
    ages.flatMap(({ rsync, openssh }) => [
      versionAvailable("rsync", rsync),
      versionAvailable("openssh", openssh),
    ]),
  )
).filter((available) => available !== true)
if (missing.length > 0) console.log(`skipped: pairs of rsync and OpenSSH, as ${missing.join("; ")}`)

describe.skipIf(missing.length > 0)("rsync and OpenSSH", () => {
  const pairOf = shared(async () => {
    const hosts = await Promise.all(ages.map((age, at) => startHost({ name: `h${at}`, delay: 0, ...age })))
    return { hosts, clients: await Promise.all(ages.map((age) => startClient({ ...age, hosts }))) }
  })
  const name = ({ rsync, openssh }: (typeof ages)[number]) => `rsync ${rsync} and OpenSSH ${openssh}`

  for (const [here, there] of pairs([0, 1]))
    test.concurrent(`${name(ages[here]!)} here, ${name(ages[there]!)} there`, async () => {
      const pair = pairOf(here, there, `/root/p${here}${there}`)
      const asked = await Promise.all(
        [pair.client, pair.host].map((one) => one.sh("rsync --version | head -n 1; ssh -V 2>&1")),
      )
      for (const [at, { stdout }] of asked.entries()) {
        const { rsync, openssh } = ages[[here, there][at]!]!
        expect(stdout).toMatch(new RegExp(`version v?${rsync}\\.[^]*OpenSSH_${openssh}[.p]`))
      }
      const greeting = await pair.client.sh(`ssh -v -o ControlPath=none ${pair.host.name} true`)
      expect(greeting.stderr).toContain(`remote software version OpenSSH_${ages[there]!.openssh}`)
      await makePair(pair)
      const first = await edict(pair, ["-v", pair.host.name, "nix", "eval", ".#lib.answer"])
      expect(first).toMatchObject({ code: 0, stdout: "42\n" })
      expect(first.stderr).toMatch(/^edict: \+ rsync /m)
      expectSame(pair)
      // Many changes at once go by rsync again; types and modes change on the way.
      const changes = `
        for n in $(seq 60); do echo "$n" >"more $n"; done; rm dangling; echo file >dangling; rm version.txt
        ln -s hello.txt version.txt; chmod 700 script.sh; rm -r many/3; mkdir -p x/y; touch x/y/z; head -c 300000 /dev/urandom >big`
      await pair.client.sh(changes, { cwd: pair.dir })
      const second = await edict(pair, ["-v", pair.host.name, ...script("echo there >>hello.txt; exit 3")])
      expect(second).toMatchObject({ code: 3, stdout: "" })
      expect(second.stderr).toMatch(/^edict: \+ rsync /m)
      expectSame(pair)
      const build = await edict(pair, [pair.host.name, "nix", "build", ".#chain"])
      expect(build).toMatchObject({ code: 0, stdout: "" })
      const opened = pair.host.log().match(/^Accepted /gm)?.length ?? 0
      expect(opened).toBeLessThanOrEqual(4) // one for each client's runs, and one for each greeting
    })
})
