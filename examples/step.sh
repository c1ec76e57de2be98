# Sourced by the other scripts: `step COMMAND…` shows a command and runs it. With --dry-run it is only shown, except
# that `dsv4 convert` and `dsv4 download` run with their own --dry-run: they read headers and write nothing.
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
