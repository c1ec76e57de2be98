# Sourced by the other scripts. `step COMMAND…` prints a command and runs it; with --dry-run it only prints it, but
# `dsv4 convert` and `dsv4 download` run with their own --dry-run, which reads headers and writes nothing.
# `needs COUNT USAGE` stops with USAGE unless COUNT arguments were given.
dry_run=
arguments=()
for argument in "$@"; do
    if [[ $argument == --dry-run ]]; then dry_run=yes; else arguments+=("$argument"); fi
done

step() {
    local line
    printf -v line '%q ' "$@"
    printf '\n$ %s\n' "${line% }"
    if [[ -z $dry_run ]]; then
        "$@"
    elif [[ $1 == dsv4 && ( $2 == convert || $2 == download ) ]]; then
        "$@" --dry-run
    fi
}

needs() {
    if [[ ${#arguments[@]} -ne $1 ]]; then
        printf 'usage: %s\n' "$2" >&2
        exit 2
    fi
}
