// Vercel's AI SDK. PROVIDER: openai (chat), responses (what the same provider takes by itself) or compatible.
import { createOpenAI } from "@ai-sdk/openai";
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { Output, generateText, isStepCount, streamText, tool } from "ai";
import { z } from "zod";
import { CONSTRAINED, CONSTRAINED_KEY, LOSSY, REAL, REAL_KEY, TOLD, TOLD_KEY, scenario } from "./report.mjs";

const PROVIDER = process.env.PROVIDER;
globalThis.AI_SDK_LOG_WARNINGS = false; // they are in the results

function model(baseURL, apiKey, name = "assistant") {
  if (PROVIDER === "openai") return createOpenAI({ baseURL, apiKey }).chat(name);
  if (PROVIDER === "responses") return createOpenAI({ baseURL, apiKey })(name);
  const options = { name: "everloop", includeUsage: true, supportsStructuredOutputs: true };
  return createOpenAICompatible({ ...options, baseURL, apiKey })(name);
}

const episode = (name) => ({ headers: { "X-Everloop-Episode": `${PROVIDER}-${name}` } });
const shown = ({ text, finishReason, usage, response, warnings }) => ({
  text,
  finish: finishReason,
  usage: { input: usage.inputTokens, output: usage.outputTokens },
  id: response.id,
  warnings: (warnings ?? []).map((warning) => warning.feature ?? warning.setting ?? warning.message),
});

async function streamed(asked) {
  let failed;
  const result = streamText({ ...asked, onError: ({ error }) => (failed = error) });
  const parts = [];
  for await (const part of result.textStream) parts.push(part);
  if (failed) throw Object.assign(failed, { heard: parts.join("") });
  const [text, finishReason, usage, response, warnings] = await Promise.all([
    result.text, result.finishReason, result.usage, result.response, result.warnings,
  ]);
  return { ...shown({ text, finishReason, usage, response, warnings }), parts: parts.length };
}

async function real() {
  const asked = { model: model(REAL, REAL_KEY), prompt: "where is my card", temperature: 0, maxOutputTokens: 20 };
  const system = { ...asked, system: "answer with a topic" };
  await scenario("whole", async () => shown(await generateText({ ...asked, ...episode("visit") })));
  await scenario("stream", () => streamed({ ...asked, ...episode("visit") }));
  await scenario("system", async () => shown(await generateText(system)));
  const drawn = { ...asked, temperature: 1, seed: 7 };
  await scenario("drawn", async () => shown(await generateText(drawn)));
  await scenario("drawn again", async () => shown(await generateText(drawn)));
  await scenario("stopped", async () => shown(await generateText({ ...drawn, stopSequences: ["a"] })));
  if (PROVIDER !== "compatible") {
    await scenario("logprobs", async () => {
      const { finalStep } = await generateText({ ...asked, providerOptions: { openai: { logprobs: 2 } } });
      return finalStep.providerMetadata.openai.logprobs.flat(); // on responses a list for each part
    });
  }
  await scenario("no such model", () => generateText({ ...asked, model: model(REAL, REAL_KEY, "gpt-5") }));
  await scenario("bad key", () => generateText({ ...asked, model: model(REAL, "ek_nobody") }));
  await scenario("bad value", () => generateText({ ...asked, temperature: 9 }));
  await scenario("left a stream", async () => {
    const left = new AbortController();
    const endless = { ...asked, prompt: "where is it", maxOutputTokens: 240, abortSignal: left.signal };
    let text = "";
    for await (const part of streamText({ ...endless, onError: () => {} }).textStream) {
      text += part;
      left.abort();
    }
    return text.length;
  });
}

async function told() {
  const asked = { model: model(TOLD, TOLD_KEY), stopWhen: isStepCount(5) };
  const once = { ...asked, maxRetries: 0 };
  for (const stream of [false, true]) {
    await scenario(stream ? "tools, streamed" : "tools", async () => {
      const looked = [];
      const weather = tool({
        description: "The weather in a city",
        inputSchema: z.object({ city: z.string() }),
        execute: ({ city }) => looked.push(city) && `sun in ${city}`,
      });
      const whole = { ...asked, prompt: "weather in Bern and Basel", tools: { weather } };
      const result = stream ? await streamed(whole) : shown(await generateText(whole));
      return { looked, ...result };
    });
  }
  for (const store of [true, false]) {
    await scenario(store ? "next turn, stored" : "next turn", async () => {
      const messages = [{ role: "user", content: "hello" }];
      const first = await generateText({ ...once, messages });
      messages.push(...first.response.messages, { role: "user", content: "and now?" });
      return shown(await generateText({ ...once, messages, providerOptions: { openai: { store } } }));
    });
  }
  await scenario("busy once", async () =>
    shown(await generateText({ ...asked, prompt: `be busy once, ${PROVIDER}`, ...episode("busy") })),
  );
  await scenario("busy", () => generateText({ ...once, prompt: `be busy, ${PROVIDER}` }));
  await scenario("fails", () => generateText({ ...once, prompt: "fail" }));
  await scenario("breaks", () => streamed({ ...once, prompt: "break off" }));
  const lossy = { ...asked, model: model(LOSSY, TOLD_KEY) };
  for (const stream of [false, true]) {
    const name = stream ? "lost-stream" : "lost";
    const headers = { ...episode(name).headers, "Idempotency-Key": `${PROVIDER}-${name}` };
    const whole = { ...lossy, prompt: `${PROVIDER}, ${name}.`, headers };
    await scenario(name, async () => (stream ? streamed(whole) : shown(await generateText(whole))));
  }
}

async function constrained() {
  const schema = z.object({ topic: z.enum(["card", "account"]), urgent: z.boolean() });
  const asked = { model: model(CONSTRAINED, CONSTRAINED_KEY), prompt: "where is my card", temperature: 1 };
  const whole = { ...asked, maxOutputTokens: 240, output: Output.object({ schema }) };
  await scenario("parsed", async () => (await generateText(whole)).output);
  await scenario("parsed stream", async () => {
    const result = streamText(whole);
    for await (const _ of result.textStream);
    return result.output;
  });
}

if (REAL) await real();
if (TOLD) await told();
if (CONSTRAINED) await constrained();
