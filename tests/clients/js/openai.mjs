// The official client in JavaScript.
import OpenAI from "openai";
import { zodResponseFormat } from "openai/helpers/zod";
import { z } from "zod";
import { CONSTRAINED, CONSTRAINED_KEY, LOSSY, REAL, REAL_KEY, TOLD, TOLD_KEY, WEATHER, scenario } from "./report.mjs";

const ask = (content) => ({ model: "assistant", messages: [{ role: "user", content }] });
const episode = (name) => ({ headers: { "X-Everloop-Episode": `openai-js-${name}` } });
const TOOLS = [{ type: "function", function: { name: "weather", parameters: WEATHER } }];

async function collected(stream) {
  const chunks = [];
  for await (const chunk of stream) chunks.push(chunk);
  const choices = chunks.flatMap((chunk) => chunk.choices);
  return {
    id: chunks[0].id,
    text: choices.map((choice) => choice.delta.content ?? "").join(""),
    finish: choices.at(-1).finish_reason,
    usage: chunks.flatMap((chunk) => (chunk.usage ? [chunk.usage] : [])),
  };
}

async function real() {
  const client = new OpenAI({ baseURL: REAL, apiKey: REAL_KEY });
  const chat = client.chat.completions;
  const short = { ...ask("where is my card"), temperature: 0, max_tokens: 20 };
  await scenario("whole", () => chat.create({ ...short, logprobs: true, top_logprobs: 2 }, episode("visit")));
  const options = { stream: true, stream_options: { include_usage: true } };
  await scenario("stream", async () => collected(await chat.create({ ...short, ...options }, episode("visit"))));
  const drawn = { ...ask("where is my card"), seed: 7, max_tokens: 20, n: 3 };
  await scenario("drawn", () => chat.create(drawn));
  await scenario("drawn again", () => chat.create(drawn));
  await scenario("stopped", () => chat.create({ ...drawn, stop: ["a"] }));
  await scenario("models", async () => (await client.models.list()).data.map((model) => model.id));
  await scenario("bad key", () => client.withOptions({ apiKey: "ek_nobody" }).chat.completions.create(short));
  await scenario("no such model", () => chat.create({ ...short, model: "gpt-5" }));
  await scenario("bad value", () => chat.create({ ...short, temperature: 9 }));
  await scenario("left a stream", async () => {
    const asked = { ...ask("where is it"), temperature: 0, n: 8, max_tokens: 240, stream: true };
    const stream = await chat.create(asked);
    for await (const _ of stream) break; // ends the iteration, and with it the request
  });
  await scenario("left a whole answer", () => {
    const signal = AbortSignal.timeout(100);
    return chat.create({ ...ask("where is it"), temperature: 0, n: 8, max_tokens: 240 }, { signal });
  });
}

async function responses() {
  const { responses } = new OpenAI({ baseURL: REAL, apiKey: REAL_KEY });
  const short = { model: "assistant", input: "where is my card", temperature: 0, max_output_tokens: 20 };
  const shown = ({ id, output_text, status, usage }) => ({ id, text: output_text, status, usage });
  await scenario("response", async () => shown(await responses.create(short, episode("response"))));
  await scenario("response, streamed", async () =>
    shown(await responses.stream(short, episode("response")).finalResponse()),
  );
  const { responses: calling } = new OpenAI({ baseURL: TOLD, apiKey: TOLD_KEY });
  await scenario("response, tools", async () => {
    const tools = [{ type: "function", name: "weather", parameters: WEATHER, strict: true }];
    const input = [{ role: "user", content: "weather in Bern and Basel" }];
    const asked = { model: "assistant", tools };
    const first = await calling.stream({ ...asked, input }).finalResponse();
    for (const { type, call_id, arguments: given } of first.output) {
      if (type === "function_call") {
        input.push({ type: "function_call_output", call_id, output: `sun in ${JSON.parse(given).city}` });
      }
    }
    input.splice(1, 0, ...first.output);
    return shown(await calling.create({ ...asked, input }));
  });
  await scenario("response breaks", () =>
    calling.stream({ model: "assistant", input: "break off" }, { maxRetries: 0 }).finalResponse(),
  );
}

async function told() {
  const client = new OpenAI({ baseURL: TOLD, apiKey: TOLD_KEY });
  const chat = client.chat.completions;
  const once = client.withOptions({ maxRetries: 0 }).chat.completions;
  await scenario("one tool", () => chat.create({ ...ask("weather in Bern"), tools: TOOLS }));
  for (const stream of [false, true]) {
    await scenario(stream ? "tools, streamed" : "tools", async () => {
      const looked = [];
      const weather = ({ city }) => looked.push(city) && `sun in ${city}`;
      const described = { name: "weather", parameters: WEATHER, parse: JSON.parse, function: weather };
      const tools = [{ type: "function", function: described }];
      const runner = chat.runTools({ ...ask("weather in Bern and Basel"), tools, stream });
      return { looked, text: await runner.finalContent() };
    });
  }
  await scenario("busy once", () => chat.create(ask("be busy once, openai-js"), episode("busy")));
  await scenario("busy", () => once.create(ask("be busy, openai-js")));
  await scenario("fails", () => once.create(ask("fail")));
  await scenario("breaks", async () => collected(await once.create({ ...ask("break off"), stream: true })));
  await scenario("helper breaks", () => once.stream({ ...ask("break off"), stream: true }).finalContent());
  const lossy = new OpenAI({ baseURL: LOSSY, apiKey: TOLD_KEY });
  for (const stream of [false, true]) {
    const name = stream ? "lost-stream" : "lost";
    await scenario(name, async () => {
      const answer = await lossy.chat.completions.create({ ...ask(`openai-js, ${name}.`), stream }, episode(name));
      return stream ? collected(answer) : answer;
    });
  }
}

async function constrained() {
  const chat = new OpenAI({ baseURL: CONSTRAINED, apiKey: CONSTRAINED_KEY }).chat.completions;
  const route = zodResponseFormat(z.object({ topic: z.enum(["card", "account"]), urgent: z.boolean() }), "route");
  const asked = { ...ask("where is my card"), max_tokens: 240, temperature: 1, response_format: route };
  await scenario("parsed", async () => (await chat.parse(asked)).choices[0].message.parsed);
  await scenario("parsed stream", async () => (await chat.stream(asked).finalMessage()).parsed);
}

if (REAL) await real();
if (REAL && TOLD) await responses();
if (TOLD) await told();
if (CONSTRAINED) await constrained();
