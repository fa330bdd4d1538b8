#!/bin/sh
# What one writes without edict: brings the current directory to a host, builds there, fetches the result, and
# takes the changes home, all over one shared connection.
#
# usage: naive.sh HOST PACKAGE
set -eu

host=$1
package=$2
control="-o ControlMaster=auto -o ControlPersist=yes -o ControlPath=/tmp/peer-%C"
directory=naive-${PWD##*/}
export NIX_SSHOPTS="$control"

rsync -a --delete -e "ssh $control" --exclude=/result ./ "$host:$directory/"
# shellcheck disable=SC2029,SC2086 # options are words, and the directory is known here
{
  ssh $control "$host" "cd $directory && nix build .#$package"
  path=$(ssh $control "$host" "readlink $directory/result")
}
nix copy --no-check-sigs --from "ssh://$host" "$path"
nix-store --realise "$path" --add-root result --indirect
rsync -a -e "ssh $control" --exclude=/result --exclude=/.git "$host:$directory/" ./
