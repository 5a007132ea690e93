// node node.mjs MODELS/ GIVEN.json: prints the result as JSON.

import { readFileSync } from "node:fs";
import * as library from "@huggingface/transformers";
import { classify } from "./classify.mjs";

const [models, given] = process.argv.slice(2);
console.log(JSON.stringify(await classify(library, models, JSON.parse(readFileSync(given, "utf-8")))));
