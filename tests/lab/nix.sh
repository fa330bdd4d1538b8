#!/bin/sh
# Unpacks a version of Nix that this Debian does not have, with all libraries, from the mirror that apt uses.
# Nothing is installed. The programs run where DIR is mounted at /run/lab/nix: their loader is named there.
#
# usage: nix.sh VERSION SUITE DIR     (nix.sh 2.26 trixie ~/.cache/edict-lab/nix-2.26)
set -eu

version=${1:?VERSION} suite=${2:?SUITE} target=${3:?DIR}
place=/run/lab/nix

main() {
  mkdir -p "$(dirname "$target")"
  exec 9>"$target.lock"
  flock 9 # of two test runs one waits
  if [ -x "$target/bin/nix" ]; then return; fi
  rm -rf "$target"
  work=$(mktemp -d)
  trap 'rm -rf "$work"' EXIT
  trap 'exit 1' INT TERM HUP
  private_apt
  download
  unpack
  mv "$work/nix" "$target.new"
  mv "$target.new" "$target"
}

fail() {
  echo "$*" >&2
  exit 1
}

# apt with its own lists, cache and idea of what is installed (nothing); only mirror and keys are the machine's.
private_apt() {
  command -v apt-get >/dev/null || fail "no apt-get here"
  mkdir -p "$work/lists/partial" "$work/archives/partial" "$work/none" "$work/here/partial"
  mirror=$(machine_mirror)
  if [ -z "$mirror" ]; then # it knows its mirrors only after an update
    apt-get -qq -o APT::Sandbox::User=root -o Dir::State::lists="$work/here" update >/dev/null 2>&1 || true
    mirror=$(machine_mirror -o Dir::State::lists="$work/here")
  fi
  [ -n "$mirror" ] || fail "apt knows no Debian mirror"
  keys=/usr/share/keyrings/debian-archive-keyring.gpg
  : >"$work/status"
  echo "deb [signed-by=$keys] $mirror $suite main" >"$work/sources.list"
}

machine_mirror() {
  # shellcheck source=/dev/null
  here=$(. /etc/os-release && echo "${VERSION_CODENAME-}")
  apt-get "$@" indextargets --format "\$(RELEASE) \$(COMPONENT) \$(REPO_URI)" "Identifier: Packages" 2>/dev/null |
    sed -n "s/^\($here\|stable\|testing\|unstable\|sid\) main //p" | head -n 1
}

apt_get() {
  apt-get -qq -o APT::Sandbox::User=root -o Dir::State="$work" -o Dir::State::status="$work/status" \
    -o Dir::Cache="$work" -o Dir::Etc::sourcelist="$work/sources.list" -o Dir::Etc::sourceparts="$work/none" \
    -o Dir::Etc::preferences=none -o Dir::Etc::preferencesparts="$work/none" \
    -o Acquire::Languages=none "$@" >"$work/log" 2>&1 || fail "apt-get $1: $(tail -n 3 "$work/log")"
}

download() {
  apt_get update
  apt_get --no-install-recommends --download-only -y install nix-bin patchelf
  found=$(dpkg-deb --field "$work"/archives/nix-bin_*.deb Version)
  case $found in
    "$version".*) ;;
    *) fail "Debian $suite has Nix $found" ;;
  esac
}

unpack() {
  for package in "$work"/archives/*.deb; do dpkg-deb --extract "$package" "$work/root"; done
  mkdir "$work/nix" "$work/nix/lib"
  gather_programs
  gather_libraries
  patch_programs
}

gather_programs() {
  mkdir "$work/nix/bin"
  cp -a "$work"/root/usr/bin/nix* "$work/nix/bin/"
}

gather_libraries() {
  find "$work/root" -name perl -prune -o -name '*.so*' \( -type f -o -type l \) -print |
    grep -E '/(lib|lib64)/([^/]*-linux-gnu/|nix/)?[^/]*$' >"$work/libraries"
  while read -r library; do
    cp -L "$library" "$work/nix/lib/" 2>/dev/null || true # links out of the packages lead nowhere
  done <"$work/libraries"
  loader=$(cd "$work/nix/lib" && echo ld-linux-*.so.*)
}

# An RPATH, unlike a RUNPATH, holds for the libraries of the libraries too.
patch_programs() {
  patchelf="$work/nix/lib/$loader --library-path $work/nix/lib $work/root/usr/bin/patchelf"
  for file in "$work"/nix/bin/* "$work"/nix/lib/libnix*; do
    if [ -L "$file" ] || [ ! -f "$file" ]; then continue; fi
    $patchelf --force-rpath --set-rpath "$place/lib" "$file"
  done
  $patchelf --set-interpreter "$place/lib/$loader" "$work/nix/bin/nix"
}

main
