#!/bin/bash
# The programs of a BSD or of macOS, as far as scripts here need them: called by one of their names, it refuses what
# only GNU's or Linux's have, and does what differs (stat -f, date -r, touch -d, xargs without input).

name=${0##*/}
real=/run/lab/usr/bin/$name
log=/root/.bsd.log # what was refused, for the tests

refuse() {
  echo "$name $*" >>"$log"
  echo "$name: illegal option -- $1" >&2
  exit 1
}

# refuse_words PATTERN WORD…: refuses the words that match
refuse_words() {
  local pattern=$1 word
  shift
  for word; do
    if [[ $word =~ $pattern ]]; then refuse "$word"; fi
  done
}

# refuse_options PATTERN WORD…: the same for options, up to the first word that is none
refuse_options() {
  local pattern=$1 word
  shift
  for word; do
    case $word in -- | - | [!-]*) return ;; esac
    if [[ $word =~ $pattern ]]; then refuse "$word"; fi
  done
}

case $name in
  rsync)
    # Apple's since macOS 15.4. Nobody may use it for more than to ask what it is.
    if [ "$*" = --version ]; then
      printf 'openrsync: protocol version 29\nrsync version 2.6.9 compatible\n'
      exit
    fi
    refuse "$@" ;;
  tar)
    # macOS adds a file ._NAME with attributes for each NAME, if it is not told otherwise.
    case $* in *-cf*) if [ -z "${COPYFILE_DISABLE-}" ]; then refuse "$@"; fi ;; esac
    real=/run/lab/usr/bin/bsdtar ;;
  stat)
    if [ "${1-}" != -f ]; then refuse "${1-}"; fi
    format=$(printf %s "$2" | sed 's/%Xp/%f/g; s/%z/%s/g; s/%Fm/%.9Y/g; s/%Fc/%.9Z/g; s/%N/%n/g')
    shift 2
    exec "$real" -c "$format" -- "$@" ;;
  find)
    case ${1--} in -[HLPEXdsx]*) ;; -*) refuse "${1-}" ;; esac
    refuse_words '^-(printf|fprintf|regextype|readable|writable|executable|perm /.*|-.+)$' "$@" ;;
  date)
    if [ "${1-}" = -r ] && [[ ${2-} =~ ^[0-9]+$ ]]; then
      set -- -d "@$2" "${@:3}"
    else
      refuse_words '^(-d|-d.+|--.*|\+.*%N.*|-r)$' "$@"
    fi ;;
  touch)
    refuse_words '^--.+$' "$@"
    if [ "${1-}" = -d ]; then refuse_words '^@' "$2"; fi ;;
  xargs)
    refuse_options '^(-[rda].*|--.+)$' "$@"
    set -- -r "$@" ;;
  sed)
    refuse_options '^(-[zsu]|-n?i|--.+)$' "$@" ;;
  grep)
    refuse_options '^(-[a-zA-Z]*P[a-zA-Z]*|--.+)$' "$@"
    for word; do case $word in /proc/*) exit 1 ;; esac done ;;
  cp) refuse_options '^(-[a-zA-Z]*[dut][a-zA-Z]*|--.+)$' "$@" ;;
  mv | ln) refuse_options '^(-[a-zA-Z]*[utTrb][a-zA-Z]*|--.+)$' "$@" ;;
  head | tail) refuse_options '^(-[nc]-.*|--.+)$' "$@" ;;
  readlink) refuse_options '^(-[mezqsv]|--.+)$' "$@" ;;
  ps) refuse_words '^(-C|--.+)$' "$@" ;;
  dd) refuse_words '^(--.+|status=progress|.flag=.*)$' "$@" ;;
  *) refuse_options '^--.+$' "$@" ;;
esac
exec "$real" "$@"
