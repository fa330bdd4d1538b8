#!/bin/bash
# One machine of the lab: private mount, process and host name spaces. Lives as long as its standard input
# stays open; then every process in it is killed, its mounts vanish, and its directory is removed.
#
# usage: namespace.sh DIR <ALIVE    (prints "ready PID", or why it could not start)
#
# DIR holds the settings (nix.conf, sshd_config, env, …) written by lab.ts, and what /root, /tmp, /nix and
# /etc show inside. /run/lab inside is the lab's own corner: the untouched /usr, the other Nix, the pid files.
set -eu

dir=${1:?DIR}
exec 2>&1

if [ "${2-}" != inside ]; then
  unshare --mount --uts --pid --fork --kill-child --propagation private bash "$0" "$dir" inside || true
  rm -rf --one-file-system -- "$dir"
  exit
fi

lab=/run/lab
nix_programs="nix nix-build nix-channel nix-collect-garbage nix-copy-closure nix-daemon nix-env nix-hash
  nix-instantiate nix-prefetch-url nix-shell nix-store"
busybox_extras="busybox rsync git git-receive-pack git-upload-pack git-upload-archive"
bsd_programs="basename chmod cmp comm cp cut date dd df dirname du find grep head id ln ls mkdir mkfifo mktemp mv
  paste ps readlink rm rmdir rsync sed sort stat tail tar tee touch tr uname uptime wc xargs"
linux_programs="flock md5sum nproc numfmt seq setsid sha256sum shuf stdbuf tac timeout"
path_directories="/usr/local/sbin /usr/local/bin /usr/sbin /usr/bin"

# Settings: NAME SHELL_NAME DISK_LIMIT HIDE BUSYBOX BSD NIX_DIR NIX_PLACE RSYNC_DIR OPENSSH_DIR BUN REPOSITORY
# SSHD_PORT PROXY_PORT DELAY
# shellcheck source=/dev/null
. "$dir/env"

main() {
  read -r outer_pid _ </proc/self/stat # /proc is still the one of the outside
  mount -t proc proc /proc
  hostname "$NAME"
  private_directories
  etc
  programs
  repository
  if [ -n "$SSHD_PORT" ]; then start_sshd; fi
  if [ -n "$PROXY_PORT" ]; then start_proxy; fi
  echo "ready $outer_pid"
  while read -r _; do :; done # bash as process 1 reaps orphans meanwhile
}

private_directories() {
  mkdir -p "$dir/root/.ssh" "$dir/tmp" "$dir/nix"
  chmod 1777 "$dir/tmp"
  chmod 700 "$dir/root" "$dir/root/.ssh"
  mkdir -p /nix
  mount -t tmpfs -o mode=755 tmpfs /run
  mkdir -p "$lab/usr" "$lab/bin" "$lab/nix" "$lab/rsync" "$lab/openssh" "$lab/dir" "$lab/repository" "$lab/farm"
  mkdir -p /run/sshd
  mount --rbind /usr "$lab/usr"
  mount --bind "$dir" "$lab/dir"
  mount --bind "$dir/nix" /nix
  if [ -n "$NIX_DIR" ]; then mount --bind "$NIX_DIR" "$lab/nix"; fi
  if [ -n "$RSYNC_DIR" ]; then mount --bind "$RSYNC_DIR" "$lab/rsync"; fi
  if [ -n "$OPENSSH_DIR" ]; then mount --bind "$OPENSSH_DIR" "$lab/openssh"; fi
  if [ -n "$REPOSITORY" ]; then mount --bind "$REPOSITORY" "$lab/repository"; fi
  touch "$lab/bin/bun"
  mount --bind "$BUN" "$lab/bin/bun"
  mount -t tmpfs tmpfs /var/log
  mount -t tmpfs -o mode=755 tmpfs /srv
  mkdir "$dir/etc"
  mount -t tmpfs -o mode=755 tmpfs "$dir/etc" # a disk takes up to a second for so many files
  cp -a /etc/. "$dir/etc"
  mount --move "$dir/etc" /etc
  if [ -n "$DISK_LIMIT" ]; then
    mount -t tmpfs -o "mode=700,size=$DISK_LIMIT" tmpfs /root
    mkdir -m 700 /root/.ssh
  else
    mount --bind "$dir/root" /root
  fi
  mount --bind "$dir/tmp" /tmp # last: DIR itself is most likely below /tmp
  dir=$lab/dir
  PATH=$lab/usr/local/sbin:$lab/usr/local/bin:$lab/usr/sbin:$lab/usr/bin # what is hidden later must work here
}

etc() {
  rm -rf /etc/nix
  mkdir /etc/nix
  cp "$dir/nix.conf" "$dir/registry.json" /etc/nix/
  sed -i "s|^root:.*|root:x:0:0:root:/root:/bin/$SHELL_NAME|" /etc/passwd
  sed -i 's|^root:[^:]*:|root:*:|' /etc/shadow # sshd refuses accounts that are locked by "!"
  sed -i 's|^hosts:.*|hosts: files|' /etc/nsswitch.conf # no machine of the lab asks the network for a name
  echo "$NAME" >/etc/hostname
}

# Whether programs must be hidden or replaced; then every directory of PATH becomes one of links.
programs() {
  if [ -z "$HIDE$BUSYBOX$BSD$NIX_DIR$RSYNC_DIR$OPENSSH_DIR" ] && [ "$NIX_PLACE" = path ]; then
    link_farm /usr/local/bin # where tests put programs of their own
    return
  fi
  for directory in $path_directories; do link_farm "$directory"; done
  if [ -n "$BUSYBOX" ]; then only_busybox; fi
  if [ -n "$BSD" ]; then like_bsd; fi
  if [ -n "$RSYNC_DIR" ]; then put_program rsync "$lab/rsync/bin/rsync"; fi
  if [ -n "$OPENSSH_DIR" ]; then put_program ssh "$lab/openssh/bin/ssh"; fi
  place_nix
  for program in $HIDE; do
    for directory in $path_directories; do rm -f "$directory/$program"; done
  done
}

# /usr/bin → links to /run/lab/usr/bin/*, in a directory that can be changed without harm.
link_farm() {
  farm=$lab/farm$1
  mkdir -p "$farm" "$1"
  for program in "$lab$1"/*; do
    if [ -e "$program" ] || [ -L "$program" ]; then
      ln -s "$lab$1"/* "$farm/"
      break
    fi
  done
  mount --bind "$farm" "$1"
}

only_busybox() {
  # shellcheck disable=SC2086
  for directory in $path_directories; do (shopt -s nullglob dotglob && rm -f $lab/farm$directory/*); done
  busybox --install -s /usr/bin
  for program in $busybox_extras "$SHELL_NAME"; do
    if [ ! -e "/usr/bin/$program" ]; then ln -s "$lab/usr/bin/$program" /usr/bin/; fi
  done
}

# put_program NAME FILE: what NAME on PATH leads to
put_program() {
  for directory in $path_directories; do rm -f "$directory/$1"; done
  ln -s "$2" "/usr/bin/$1"
}

like_bsd() {
  for program in $linux_programs; do rm -f "/usr/bin/$program"; done
  for program in $bsd_programs; do put_program "$program" "$dir/bsd.sh"; done
  put_program awk "$lab/usr/bin/original-awk"
}

place_nix() {
  from=$lab/usr/bin
  if [ -n "$NIX_DIR" ]; then from=$lab/nix/bin; fi
  to=/usr/bin
  if [ "$NIX_PLACE" = profile ]; then
    to=/nix/var/nix/profiles/default/bin
    mkdir -p "$to"
  fi
  for program in $nix_programs; do
    rm -f "/usr/bin/$program"
    if [ "$NIX_PLACE" != none ]; then ln -s "$from/$program" "$to/$program"; fi
  done
  build_hook
}

# Debian's Nix starts this one, a link to /usr/bin/nix, before every build.
build_hook() {
  if [ "$NIX_PLACE" != profile ] || [ ! -d /usr/libexec/nix ]; then return; fi
  mkdir -p "$lab/libexec"
  ln -s "$from/nix" "$lab/libexec/build-remote"
  mount --bind "$lab/libexec" /usr/libexec/nix
}

# The checkout must stay visible for the client even if it lies below the hidden /root or /tmp.
repository() {
  if [ -z "$REPOSITORY" ]; then return; fi
  if [ ! -e "$REPOSITORY/tests/lab/namespace.sh" ]; then
    mkdir -p "$REPOSITORY"
    mount --bind "$lab/repository" "$REPOSITORY"
  fi
}

start_sshd() {
  ssh-keygen -q -t ed25519 -N "" -f "$dir/host_key" </dev/null
  sshd=$lab/usr/sbin/sshd
  if [ -n "$OPENSSH_DIR" ]; then
    sshd=$lab/openssh/bin/sshd
    printf '%s\n' "SshdSessionPath $sshd-session" "SshdAuthPath $sshd-auth" >>"$dir/sshd_config"
  fi
  "$sshd" -D -f "$dir/sshd_config" -E "$dir/sshd.log" </dev/null >/dev/null 2>&1 &
  echo $! >"$lab/sshd.pid"
  await_port "$SSHD_PORT" $! "$dir/sshd.log"
}

start_proxy() {
  "$lab/bin/bun" "$dir/proxy.ts" "$PROXY_PORT" "$SSHD_PORT" "$DELAY" </dev/null >"$dir/proxy.log" 2>&1 &
  echo $! >"$lab/proxy.pid"
  await_port "$PROXY_PORT" $! "$dir/proxy.log"
}

# await_port PORT PID LOG: until the process listens; shows its log if it ended instead.
await_port() {
  while sleep 0.01; do
    if ! kill -0 "$2" 2>/dev/null; then
      cat "$3"
      exit 1
    fi
    if (exec 3<>"/dev/tcp/127.0.0.1/$1") 2>/dev/null; then return; fi
  done
}

PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin
main
