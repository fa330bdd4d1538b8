#!/bin/sh
# Makes a Debian machine ready for the tests: installs what is missing, and nothing else. Silent if nothing is.
#
# usage: setup.sh [PROGRAM:PACKAGE…]     (further programs, of these Debian packages)
set -eu

cd "$(dirname "$0")/../.."

bun_version=1.4.5

# program:package, where the program tells whether the package is there
programs="nix:nix-bin sshd:openssh-server ssh:openssh-client rsync:rsync git:git bash:bash zsh:zsh fish:fish
  dash:dash busybox:busybox tmux:tmux socat:socat unshare:util-linux nsenter:util-linux setpriv:util-linux
  script:bsdutils ps:procps pkill:procps tar:tar patch:patch
  mandoc:mandoc bsdtar:libarchive-tools original-awk:original-awk
  qemu-aarch64-static:qemu-user-static /usr/aarch64-linux-gnu/lib/ld-linux-aarch64.so.1:libc6-arm64-cross
  ld-musl-config:musl
  mksh:mksh yash:yash"

PATH=$PATH:/usr/local/sbin:/usr/sbin:/sbin
export PATH

main() {
  packages=$(missing_packages "$@")
  if [ -n "$packages" ]; then install_packages "$packages"; fi
  if ! has_bun; then install_bun; fi
  if ! has_modules; then install_modules; fi
}

fail() {
  echo "setup: $*" >&2
  exit 1
}

missing_packages() {
  for entry in $programs "$@"; do
    if ! command -v "${entry%%:*}" >/dev/null; then echo "${entry#*:}"; fi
  done | sort -u | tr '\n' ' '
}

as_root() {
  if [ "$(id -u)" = 0 ]; then
    "$@"
  elif command -v sudo >/dev/null; then
    sudo "$@"
  else
    fail "need root (or sudo) for: $*"
  fi
}

# Without a terminal, questions or started services: RUNLEVEL=1 keeps Debian from starting sshd.
apt_get() {
  as_root env DEBIAN_FRONTEND=noninteractive RUNLEVEL=1 apt-get -qq -o Dpkg::Use-Pty=0 "$@"
}

install_packages() {
  command -v apt-get >/dev/null || fail "this is no Debian; please install: $1"
  echo "setup: installing $1"
  log=$(mktemp)
  # shellcheck disable=SC2086 # a list of packages
  if ! { apt_get update && apt_get install --no-install-recommends -y $1; } >"$log" 2>&1; then
    cat "$log" >&2
    rm -f "$log"
    fail "apt-get could not install $1"
  fi
  rm -f "$log"
  stop_sshd
}

# A service manager may have started the new sshd all the same; the tests bring their own.
stop_sshd() {
  case $packages in
    *openssh-server*) ;;
    *) return ;;
  esac
  if [ -d /run/systemd/system ]; then as_root systemctl disable --quiet --now ssh.service ssh.socket || true; fi
}

# This version or a newer one.
has_bun() {
  command -v bun >/dev/null || return
  [ "$(printf '%s\n' "$bun_version" "$(bun --version)" | sort -V | head -n 1)" = "$bun_version" ]
}

npm_version() {
  npm --version 2>/dev/null | cut -d. -f1
}

# npm 11 and later runs a package's install script only if told so; older ones do not know the option.
install_bun() {
  command -v npm >/dev/null || fail "need npm to install Bun $bun_version (or install it yourself)"
  echo "setup: installing bun $bun_version"
  if [ "$(npm_version)" -ge 11 ]; then set -- --allow-scripts=bun; else set --; fi
  if [ -w "$(npm prefix -g 2>/dev/null)" ]; then as=; else as=as_root; fi
  $as npm install --global --silent "bun@$bun_version" "$@" >&2 || fail "npm could not install bun@$bun_version"
  has_bun || fail "bun $bun_version is installed, but not first on PATH"
}

# Whole, and not older than bun.lock.
has_modules() {
  [ -n "$(find node_modules/.complete -newer bun.lock 2>/dev/null)" ]
}

# The registry of npm's configuration, which Bun does not read everywhere; bun.lock names none.
install_modules() {
  echo "setup: installing node_modules"
  registry=$(npm config get registry 2>/dev/null) || registry=
  if [ -n "$registry" ]; then export BUN_CONFIG_REGISTRY="$registry"; fi
  bun install --frozen-lockfile --silent || fail "bun install failed"
  touch node_modules/.complete
}

main "$@"
