#!/bin/sh
# Unpacks programs of another Debian suite, with all libraries, from the mirror that apt uses. Nothing is installed.
# The programs run where DIR is mounted at PLACE: their loader is named there.
#
# usage: debian.sh SUITE VERSION DIR PLACE PACKAGES PROGRAM…
#        debian.sh trixie 2.26 ~/.cache/edict-lab/nix-2.26 /run/lab/nix nix-bin 'usr/bin/nix*'
set -eu

suite=${1:?SUITE} version=${2:?VERSION} target=${3:?DIR} place=${4:?PLACE} packages=${5:?PACKAGES}
shift 5
apt=$(dirname "$target")/apt-$suite # lists of packages, for all that are taken from the suite

main() {
  mkdir -p "$(dirname "$target")"
  exec 9>"$target.lock"
  flock 9 # of two test runs one waits
  if [ -d "$target/bin" ]; then return; fi
  work=$(mktemp -d)
  trap 'rm -rf "$work"' EXIT
  trap 'exit 1' INT TERM HUP
  private_apt
  download
  unpack "$@"
  rm -rf "$target.new"
  mv "$work/made" "$target.new"
  mv "$target.new" "$target"
}

fail() {
  echo "$*" >&2
  exit 1
}

# apt with its own lists, cache and idea of what is installed (nothing); only mirror and keys are the machine's.
private_apt() {
  command -v apt-get >/dev/null || fail "no apt-get here"
  mkdir -p "$apt/lists/partial" "$work/archives/partial" "$work/none" "$work/here/partial"
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
  apt-get -qq -o APT::Sandbox::User=root -o Dir::State="$apt" -o Dir::State::status="$work/status" \
    -o Dir::Cache="$apt" -o Dir::Cache::archives="$work/archives" \
    -o Dir::Etc::sourcelist="$work/sources.list" -o Dir::Etc::sourceparts="$work/none" \
    -o Dir::Etc::preferences=none -o Dir::Etc::preferencesparts="$work/none" \
    -o Acquire::Languages=none "$@" >"$work/log" 2>&1 || fail "apt-get $1: $(tail -n 3 "$work/log")"
}

download() {
  exec 8>"$apt.lock"
  flock 8
  if [ -z "$(find "$apt/updated" -mmin -30 2>/dev/null)" ]; then
    apt_get update
    touch "$apt/updated"
  fi
  # shellcheck disable=SC2086 # a list of packages
  apt_get --no-install-recommends --download-only -y install $packages patchelf
  exec 8>&-
  found=$(dpkg-deb --field "$work/archives/${packages%% *}"_*.deb Version)
  case ${found#*:} in
    "$version"[!0-9]*) ;;
    *) fail "Debian $suite has ${packages%% *} $found" ;;
  esac
}

unpack() {
  for package in "$work"/archives/*.deb; do dpkg-deb --extract "$package" "$work/root"; done
  mkdir "$work/made" "$work/made/bin" "$work/made/lib"
  gather_libraries
  for program in "$@"; do
    # shellcheck disable=SC2086 # a pattern
    cp -a "$work"/root/$program "$work/made/bin/"
  done
  patch_programs
}

gather_libraries() {
  find "$work/root" -name perl -prune -o -name '*.so*' \( -type f -o -type l \) -print |
    grep -E '/(lib|lib64)/([^/]*-linux-gnu/|nix/)?[^/]*$' >"$work/libraries"
  while read -r library; do
    cp -L "$library" "$work/made/lib/" 2>/dev/null || true # links out of the packages lead nowhere
  done <"$work/libraries"
  loader=$(cd "$work/made/lib" && echo ld-linux-*.so.*)
}

# An RPATH, unlike a RUNPATH, holds for the libraries of the libraries too.
patch_programs() {
  patchelf="$work/made/lib/$loader --library-path $work/made/lib $work/root/usr/bin/patchelf"
  for file in "$work"/made/bin/* "$work"/made/lib/libnix*; do
    if [ -L "$file" ] || [ ! -f "$file" ]; then continue; fi
    $patchelf --force-rpath --set-rpath "$place/lib" "$file"
    case $file in "$work"/made/bin/*) $patchelf --set-interpreter "$place/lib/$loader" "$file" ;; esac
  done
}

main "$@"
