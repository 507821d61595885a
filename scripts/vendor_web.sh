#!/usr/bin/env bash
# Copies the libraries of the page of `xbai serve` from npm into xbai/serve/web/vendor, their licences beside them.
# Each is pinned, and refused where its archive is not the one that was looked at.
#
#   bash scripts/vendor_web.sh
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
vendor=$PWD/xbai/serve/web/vendor
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT

declare -A sha512=(
    [preact@11.2.0]=/HfHI/7N84e6GrWBJ3J280z3mLaRJiDcSvj/A+y/4AbLnND/1UlGHe1sR6oYuTGwId0nP7dqDU9OnLxMPZ7xBg==
    [htm@3.1.1]=983Vyg8NwUE7JkZ6NmOqpCZ+sh1bKv2iYTlUkzlWmA5JD2acKoxd4KVxbMmxX/85mtfdnDmTFoNKcg5DGAvxNQ==
    [marked@18.2.1]=ii4bxCTCqqwpT86XZWgJNs+ZnAIZksmLGYMViWA7PDIXYIeNo1x6cDdX3JOip9NM/cI6p8z57FxliACboTruMA==
    [dompurify@3.5.0]=LYC0ZkE8P1V42JsRYTwMdme/2ET8SpOc5AA2eOFjP/IadvRd2fwiT4TVz5vkfy0XUx12aS2UaRkTnfVPNOv9vw==
    [temml@0.13.5]=aPkDDgunanpLNL0ql32HbolqLep+w8DRcVXRql7rWrMt/PhczdLgL4UBYYVU3BYjCNjkGq4EqwIicu/zWr1iOg==
)

# copy NAME@VERSION FILE=AS...
copy() {
    local package=$1 name=${1%@*} archive pair
    shift
    archive=$scratch/$(cd "$scratch" && npm pack --silent "$package")
    if [[ $(openssl dgst -sha512 -binary "$archive" | base64 -w0) != "${sha512[$package]}" ]]; then
        echo "error: the archive of $package is not the pinned one" >&2
        exit 2
    fi
    mkdir "$scratch/$name"
    tar -xzf "$archive" -C "$scratch/$name" --strip-components=1
    for pair in LICENSE="$name.LICENSE" "$@"; do
        cp "$scratch/$name/${pair%=*}" "$vendor/${pair#*=}"
    done
    echo "$package sha512-${sha512[$package]}" >>"$vendor/VERSIONS"
}

rm -rf "$vendor"
mkdir -p "$vendor"
copy preact@11.2.0 dist/preact.mjs=preact.js hooks/dist/hooks.mjs=preact-hooks.js
copy htm@3.1.1 dist/htm.module.js=htm.js
copy marked@18.2.1 lib/marked.esm.js=marked.js
copy dompurify@3.5.0 dist/purify.min.js=purify.js
copy temml@0.13.5 dist/temml.min.js=temml.js dist/Temml-Local.css=temml.css dist/Temml.woff2=Temml.woff2
# A browser knows no packages, only addresses; and the maps are not here.
sed -i 's#from"preact"#from"./preact.js"#' "$vendor/preact-hooks.js"
sed -i '/^\/\/# sourceMappingURL=/d' "$vendor"/*.js
