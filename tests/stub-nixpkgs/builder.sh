# shellcheck shell=bash disable=SC2154,SC2016 # its variables are the attributes of the derivation
# What stdenv does with a derivation, as far as ../../flake.nix needs it. Runs as bash -eu.

PATH=/run/lab/bin:/usr/local/bin:/usr/bin:/bin
for input in ${nativeBuildInputs-}; do PATH=$input/bin:$PATH; done
export PATH SOURCE_DATE_EPOCH=315532800

# makeWrapper PROGRAM FILE [--add-flags WORDS] [--prefix|--suffix PATH : VALUE]…
makeWrapper() {
  local program=$1 file=$2 flags=
  shift 2
  mkdir -p "${file%/*}"
  echo "#!/bin/bash" >"$file"
  while [ $# -gt 0 ]; do
    case $1 in
      --add-flags) flags=$2 && shift 2 ;;
      --prefix) printf 'export %s="%s${%s:+%s$%s}"\n' "$2" "$4" "$2" "$3" "$2" >>"$file" && shift 4 ;;
      --suffix) printf 'export %s="${%s:+$%s%s}%s"\n' "$2" "$2" "$2" "$3" "$4" >>"$file" && shift 4 ;;
      *) return 1 ;;
    esac
  done
  printf 'exec "%s" %s "$@"\n' "$program" "$flags" >>"$file"
  chmod +x "$file"
}

# installShellCompletion --cmd NAME --SHELL FILE
installShellCompletion() {
  case $3 in
    --bash) install -D -m 644 "$4" "$out/share/bash-completion/completions/$2.bash" ;;
    --zsh) install -D -m 644 "$4" "$out/share/zsh/site-functions/_$2" ;;
    --fish) install -D -m 644 "$4" "$out/share/fish/vendor_completions.d/$2.fish" ;;
    *) return 1 ;;
  esac
}

# installManPage FILE.SECTION
installManPage() {
  install -D -m 644 "$1" "$out/share/man/man${1##*.}/${1##*/}"
}

if [ -n "${buildCommand-}" ]; then
  eval "$buildCommand"
else
  cp -r "$src" source
  chmod -R u+w source
  cd source || exit
  eval "${buildPhase-}"
  eval "$installPhase"
fi
