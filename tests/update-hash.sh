#!/bin/sh
# Writes into flake.nix the hash of the packages that edict consists of (bun.lock, without the tools of development).
# Nix builds nothing for that: Bun installs them here by the command in flake.nix, and Nix says the directory's hash.
set -eu

cd "$(dirname "$0")/.."

main() {
  work=$(mktemp -d)
  trap 'rm -rf "$work"' EXIT
  trap 'exit 1' INT TERM HUP
  install_modules
  hash=$(nix --extra-experimental-features nix-command hash path "$work/node_modules")
  sed "s|outputHash = \"[^\"]*\"|outputHash = \"$hash\"|" flake.nix >"$work/flake.nix"
  if cmp -s "$work/flake.nix" flake.nix; then
    echo "flake.nix is up to date: $hash"
  else
    cat "$work/flake.nix" >flake.nix
    echo "flake.nix has a new hash: $hash"
  fi
}

# The registry of npm's configuration, which Bun does not read everywhere.
install_modules() {
  registry=$(npm config get registry 2>/dev/null) || registry=
  if [ -n "$registry" ]; then export BUN_CONFIG_REGISTRY="${BUN_CONFIG_REGISTRY-$registry}"; fi
  command=$(sed -n 's/^ *\(bun install --frozen-lockfile .*\)$/\1/p' flake.nix)
  cp package.json bun.lock "$work"
  # shellcheck disable=SC2086 # the words of a command
  (cd "$work" && $command >/dev/null)
  rm -rf "$work/node_modules/.bin"
}

main
