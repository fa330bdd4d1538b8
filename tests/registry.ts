/** Where tests get npm packages from. */

/** The registry that npm is set up for, or why a test that needs it has to be skipped. */
export type Registry = Readonly<{ url: string; why?: undefined } | { url?: undefined; why: string }>

/** Asks npm for its registry, and the registry for a package of edict. */
export async function npmRegistry(): Promise<Registry> {
  if (!Bun.which("npm")) return { why: "npm is not on PATH" }
  const url = Bun.spawnSync(["npm", "config", "get", "registry"], { stderr: "ignore" })
    .stdout.toString()
    .trim()
  try {
    const answer = await fetch(new URL("zx", url), { method: "HEAD", signal: AbortSignal.timeout(15_000) })
    return answer.ok ? { url } : { why: `the registry of npm answers ${answer.status}` }
  } catch (error) {
    return { why: `the registry of npm cannot be reached: ${String(error)}` }
  }
}

/** The environment for a Bun that installs from it: registry, proxies and certificates as here, nothing else. */
export function registryEnvironment(url: string): Record<string, string> {
  const kept = /^(NODE_EXTRA_CA_CERTS|SSL_CERT_FILE|SSL_CERT_DIR|(https?|no|all)_proxy)$/i
  const here = Object.entries(process.env).filter(([name]) => kept.test(name)) as [string, string][]
  return { ...Object.fromEntries(here), BUN_CONFIG_REGISTRY: url }
}
